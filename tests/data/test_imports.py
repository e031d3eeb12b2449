import pathlib
import subprocess
import sys

import jaxinfra.data

FOLDER = pathlib.Path(jaxinfra.data.__path__[0])


def test_no_module_but_those_of_devices_imports_jax():
    with_jax = ("device", "digests")
    names = [
        p.stem for p in FOLDER.glob("*.py") if p.stem not in (*with_jax, "__init__")
    ]
    assert len(names) == len(list(FOLDER.glob("*.py"))) - 3
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(names)}:\n"
        "    importlib.import_module(f'jaxinfra.data.{name}')\n"
        "bad = {'jax', 'jaxlib', 'torch', 'tensorflow'} & sys.modules.keys()\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
