"""Starts Milvus's own server, of PyPI's package `milvus`, until its input ends: FOLDER PORT.

It prints its port once it answers. A line of input kills it, as a power cut would, and starts it again.
"""

import os
import signal
import subprocess
import sys

from milvus import MilvusServer


def kill(server: MilvusServer) -> None:
    if server.server_proc is not None:
        server.server_proc.kill()  # it would take long to end by itself
        server.server_proc.wait()


def start_again(server: MilvusServer, command: list[bytes], environment: dict[bytes, bytes]) -> None:
    """Starts a killed server with the ports that it had: `MilvusServer` would look for others."""
    server.server_proc = subprocess.Popen(
        command,
        env=environment,
        cwd=sys.argv[1],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server.wait_started()


def of_process(name: str) -> list[bytes]:
    with open(f"/proc/{server.server_proc.pid}/{name}", "rb") as file:
        return [one for one in file.read().split(b"\0") if one]


# Each answer waits for the clock of the server, which goes on every 200 ms by default.
os.environ.setdefault("PROXY_TIMETICKINTERVAL", "20")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
server = MilvusServer()
server.set_base_dir(sys.argv[1])
server.listen_port = int(sys.argv[2])
try:
    server.start()
    print(server.listen_port, flush=True)  # perhaps another one: that was taken
    for _ in sys.stdin:
        command = of_process("cmdline")
        environment = dict(one.split(b"=", 1) for one in of_process("environ"))
        kill(server)
        start_again(server, command, environment)
        print(server.listen_port, flush=True)
finally:
    kill(server)
