"""Starts Milvus's own server, of PyPI's package `milvus`, until its input ends: FOLDER PORT.

It prints its port once it answers. A line of input kills it, as a power cut would, and starts it again.
"""

import signal
import sys

from milvus import MilvusServer


def kill(server: MilvusServer) -> None:
    if server.server_proc is not None:
        server.server_proc.kill()  # it would take long to end by itself
        server.server_proc.wait()


signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
server = MilvusServer()
server.set_base_dir(sys.argv[1])
server.listen_port = int(sys.argv[2])
try:
    server.start()
    print(server.listen_port, flush=True)  # perhaps another one: that was taken
    for _ in sys.stdin:
        port = server.listen_port
        kill(server)
        server = MilvusServer()
        server.set_base_dir(sys.argv[1])
        server.listen_port = port
        server.start()
        print(server.listen_port, flush=True)
finally:
    kill(server)
