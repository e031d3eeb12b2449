"""A real NameNode and DataNode with WebHDFS on loopback, where a folder has their jars.

`JAXINFRA_HADOOP_JARS` names it. Hadoop 2.7's own jars are in the package pyspark 2.4.8
(jars of javax.ws.rs-api, jersey-* 2.22, hk2 and glassfish left out), and these Debian
packages add what it does not bring: libjersey1-{core,json,server,servlet}-java,
libjsr311-api-java, libasm-java, libjettison-java, libcommons-daemon-java. Java 8 to 17.
"""

import contextlib
import os
import pathlib
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import pytest
from data.object_stores import START_SECS, Process, free_ports

JARS = "JAXINFRA_HADOOP_JARS"
_PACKAGES = ("java.lang", "java.util", "java.io")
_OPEN = [w for p in _PACKAGES for w in ("--add-opens", f"java.base/{p}=ALL-UNNAMED")]
_NODE = "org.apache.hadoop.hdfs.server"


class Hadoop:
    """Both nodes; `kill` and `start` as of one server. `url`: of WebHDFS."""

    def __init__(self, name_node: Process, data_node: Process, host: str):
        self.name_node, self.data_node = name_node, data_node
        self.host, self.url = host, f"http://{host}/webhdfs/v1"

    def start(self) -> None:
        self.name_node.start()
        self.data_node.start()
        deadline = time.monotonic() + START_SECS
        while not self.is_writable():
            assert time.monotonic() < deadline, self.data_node.log.read_text()[-2_000:]
            time.sleep(0.3)

    def is_writable(self) -> bool:
        """Whether a DataNode has said that it is there, and blocks are reported."""
        query = "?op=CREATE&overwrite=true&user.name=test"
        request = urllib.request.Request(f"{self.url}/ready{query}", b"", method="PUT")
        try:
            urllib.request.urlopen(request, timeout=5).close()
        except OSError as error:
            return getattr(error, "code", 0) == 307  # where to write
        return True

    def kill(self) -> None:
        self.data_node.kill()
        self.name_node.kill()


@contextlib.contextmanager
def hdfs_server(folder: pathlib.Path) -> Iterator[Hadoop]:
    """An empty file system below `folder`."""
    if not (jars := os.environ.get(JARS)) or not (java := shutil.which("java")):
        pytest.skip(f"needs java and a folder of Hadoop's jars, named by {JARS}")
    rpc, http, *data = free_ports(5)
    host = f"127.0.0.1:{http}"
    settings = {
        "fs.defaultFS": f"hdfs://127.0.0.1:{rpc}",
        "hadoop.tmp.dir": f"{folder}/data",
        "dfs.replication": "1",
        "dfs.permissions.enabled": "false",
        "dfs.namenode.http-address": host,
        "dfs.datanode.hostname": "127.0.0.1",
        "dfs.namenode.safemode.extension": "0",
        **{
            f"dfs.datanode.{name}": f"127.0.0.1:{port}"
            for name, port in zip(("address", "http.address", "ipc.address"), data)
        },
    }
    properties = "".join(
        f"<property><name>{name}</name><value>{value}</value></property>"
        for name, value in settings.items()
    )
    for name in ("core-site.xml", "hdfs-site.xml"):
        (folder / name).write_text(f"<configuration>{properties}</configuration>")
    for name in ("hdfs", "datanode"):  # pages that the nodes want to find
        page = folder / "webapps" / name / "WEB-INF" / "web.xml"
        page.parent.mkdir(parents=True)
        page.write_text("<web-app/>")
    found = sorted(map(str, pathlib.Path(jars).glob("*.jar")))
    command = [java, "-Xmx300m", *_OPEN, "-cp", ":".join([str(folder), *found])]
    name_node = [*command, f"{_NODE}.namenode.NameNode"]
    data_node = [*command, f"{_NODE}.datanode.DataNode"]
    form = [*name_node, "-format", "-force", "-nonInteractive"]
    subprocess.run(form, check=True, capture_output=True, timeout=START_SECS)
    answer = f"http://{host}/webhdfs/v1/?op=LISTSTATUS"
    server = Hadoop(
        Process(name_node, answer, folder / "name.log"),
        Process(data_node, f"http://127.0.0.1:{data[1]}", folder / "data.log"),
        host,
    )
    try:
        server.start()
        yield server
    finally:
        server.kill()
