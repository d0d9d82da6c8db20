"""A server of the S3 API, moto's, on this machine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import s3fs

from dist_train.node import free_port, port_fault

CODE = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"
START_S = 30.0


@contextmanager
def s3_server(log: Path) -> Iterator[None]:
    """Serves inside the block, in which this process's S3 clients find it; log: the file of its requests."""
    port = free_port()
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
    variables = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1", **keys}
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.MonkeyPatch.context() as patch, log.open("wb") as stream:
        for name, value in variables.items():
            patch.setenv(name, value)
        process = subprocess.Popen([sys.executable, "-c", CODE, str(port)], stderr=stream, stdout=stream)
        try:
            deadline = time.monotonic() + START_S
            while not port_fault(port):
                assert time.monotonic() < deadline and process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield
        finally:
            process.kill()
            process.wait()
            s3fs.S3FileSystem.clear_instance_cache()
