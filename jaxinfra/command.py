"""The console command: `jaxinfra <verb> ...` does what `scripts/<verb>.py ...` does."""

import pathlib
import runpy
import sys

_HERE = pathlib.Path(__file__).parent
# In a wheel the scripts are packaged beside this file; in a checkout beside its folder.
_FOLDERS = (_HERE / "scripts", _HERE.parent / "scripts")


def main() -> None:
    """Runs the script named by the first argument, as its own main program."""
    scripts = {
        path.stem: path
        for folder in reversed(_FOLDERS)
        for path in sorted(folder.glob("[a-z]*.py"))
    }
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb not in scripts:
        print(f"usage: jaxinfra {{{'|'.join(sorted(scripts))}}} ...", file=sys.stderr)
        sys.exit(0 if verb in ("-h", "--help") else 2)
    sys.argv = [str(scripts[verb]), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
