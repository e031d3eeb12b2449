"""Records of `dataset.json`: just the keys that there are, of just their types."""

from collections.abc import Mapping
from typing import Any

from jaxinfra.config import DataError


def check_keys(value: Any, keys: Mapping[str, type], where: Any) -> None:
    """Raises DataError unless `value` is a dict of just these keys and types."""
    if not isinstance(value, dict) or value.keys() != keys.keys():
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"{where} must hold exactly the keys {sorted(keys)}, not {found}; "
            "prepare it again"
        )
    for key, kind in keys.items():
        # Not isinstance: bool is an int, but no number of tokens.
        if type(found := value[key]) is not kind or (
            kind is int and not 0 <= found < 2**63
        ):
            raise DataError(
                f"{where}: {key} must be {kind.__name__}, not {found!r:.80}; "
                "prepare it again"
            )


def check_equal(where: Any, key: str, record: dict[str, Any], rule: Any) -> None:
    """Raises DataError unless the record says of `key` what `rule` says."""
    if record[key] != rule:
        raise DataError(
            f"{where}: {key} is {record[key]!r}, but what it describes says {rule!r}; "
            "prepare it again"
        )
