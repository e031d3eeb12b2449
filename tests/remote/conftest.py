"""An object store in memory, with the conditions of a real one."""

import pytest
import tensorstore

from jaxinfra.remote import object_path


@pytest.fixture
def bucket(monkeypatch):
    """A folder of a store that holds nothing."""
    kept = tensorstore.KvStore.open({"driver": "memory"}).result()
    monkeypatch.setattr(object_path, "_store", lambda scheme, bucket, process: kept)
    return object_path.ObjectPath("s3://bucket/run")
