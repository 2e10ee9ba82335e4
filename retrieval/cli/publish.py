"""The commands of published galleries: `publish`, `follow` and `published`."""

import re
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from retrieval.cli import options
from retrieval.cli.opening import open_gallery, require_folder
from retrieval.cli.output import print_json
from retrieval.console import terminal
from retrieval.errors import FaceprintError, GalleryReplaced, InputError
from retrieval.system.places import Place

if TYPE_CHECKING:
    from retrieval.replication.follow import FollowerFolder, Synced
    from retrieval.replication.objects import ObjectStore
    from retrieval.replication.publish import Published, Publisher
    from retrieval.replication.status import ErasureStatus

_DURATION: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)?")
_UNITS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, None: 1.0}
_POLL_SECONDS: Final = 0.1

_Address = Annotated[str, typer.Argument(metavar="ADDRESS", help="Where it is published: s3://BUCKET/FOLDER, or a folder.", show_default=False)]  # fmt: skip

_PUBLISH: Final = "any number of machines can open it by its address, so nothing needs to follow it"


def publish(
    gallery: options.Gallery,
    address: _Address,
    every: Annotated[str | None, typer.Option(metavar="TIME", help="Go on, and publish again after so many seconds (s), minutes (m) or hours (h).", show_default="once")] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Who publishes: followers say so.", show_default="this machine and the gallery's folder")] = None,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Publish a gallery in an object store or a folder, for followers on other machines to answer searches of.

    Only what is new is written, while others enroll and search. What was forgotten is deleted from the store, and
    the command lists which followers have confirmed that they have nothing of it either.
    """
    from retrieval.replication.publish import Publisher
    from retrieval.storage.vault import in_folder
    from retrieval.system.signals import graceful

    seconds = None if every is None else _seconds(every, "--every")
    with open_gallery(gallery, "publish") as opened:
        publisher = Publisher(in_folder(opened.vault, _PUBLISH), address, name=name)
        _print_published(publisher.publish(), publisher.objects, as_json=as_json)
        if seconds is None:
            return
        with graceful() as should_stop:
            _repeat(lambda: _publish_again(publisher, as_json=as_json), seconds, should_stop)


def _publish_again(publisher: "Publisher", *, as_json: bool) -> None:
    done = publisher.publish()
    if done.changed:
        _print_published(done, publisher.objects, as_json=as_json)


def _print_published(done: "Published", objects: "ObjectStore", *, as_json: bool) -> None:
    from retrieval.replication.status import publication_status

    status = publication_status(objects)
    if as_json:
        typer.echo(_line({**asdict(done), "followers": len(status.followers), "waiting": [asdict(one) for one in status.waiting]}))  # fmt: skip
        return
    printed = terminal.console()
    what = (
        f"{terminal.counted(done.objects_written, 'object')} written ({terminal.size(done.bytes_written)})"
        if done.changed
        else "nothing changed"
    )
    deleted = f", {done.objects_deleted:,} deleted" if done.objects_deleted else ""
    printed.print(
        terminal.text(
            f"state {done.number:,} of {done.address}: {terminal.counted(done.faces, 'face')}, revision "
            f"{done.revision:,}; {what}{deleted}"
        )
    )
    waiting = {one.receipt for one in status.waiting}
    for erasure in status.erasures:
        if erasure.receipt in waiting or erasure.receipt in done.erasures:
            printed.print(terminal.text(f"  {_of_erasure(erasure)}"))


def _of_erasure(erasure: "ErasureStatus") -> str:
    """Returns who confirmed an erasure, in words."""
    said = f"erasure {erasure.receipt}, {erasure.at}: "
    if not erasure.confirmed and not erasure.waiting:
        return f"{said}gone from the store; there is no follower"
    confirmed = f"confirmed by {', '.join(erasure.confirmed)}" if erasure.confirmed else "confirmed by nobody"
    waiting = f"; not yet by {', '.join(erasure.waiting)}" if erasure.waiting else ""
    return f"{said}gone from the store, {confirmed}{waiting}"


def follow(
    address: _Address,
    folder: Annotated[Place, typer.Argument(metavar="FOLDER", help="Where the copy lies: a new folder, or one that follows this address.", show_default=False, parser=Place.of)],
    once: Annotated[bool, typer.Option("--once", help="Fetch the current state and end.")] = False,
    every: Annotated[str, typer.Option(metavar="TIME", help="How often to look for a new state: seconds (s), minutes (m) or hours (h).")] = "5s",
    max_age: Annotated[str | None, typer.Option("--max-age", metavar="TIME", help="Refuse searches when the publisher was last heard of longer ago.", show_default="never")] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="The follower's name in the list of who confirmed erasures.", show_default="the machine's, and random digits")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Answer searches of the copy over HTTP too.")] = False,
    host: Annotated[str, typer.Option(metavar="HOST", help="With --serve: the name or IP address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve: the port; 0 for any free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="With --serve: how many processes answer.")] = 1,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Keep a read-only copy of a published gallery in step, and with --serve answer searches of it.

    The folder is a gallery for every command that reads; commands that write refuse it. Every file is compared with
    its SHA-256, and the copy changes from one published state to the next in one step, while it is searched.
    """
    from retrieval.replication.follow import FollowerFolder
    from retrieval.system.signals import graceful

    seconds = _seconds(every, "--every")
    oldest = None if max_age is None else _seconds(max_age, "--max-age")
    copy = require_folder(folder, "name one, and copy that with `faceprint copy`")
    with FollowerFolder(address, copy, name=name, max_age=oldest) as following:
        if serve:
            _serve(following, seconds, {"host": host, "port": port, "workers": workers, "device": device}, as_json=as_json)  # fmt: skip
            return
        if once or not following.has_state:
            _print_synced(following.sync(), as_json=as_json)
        if not once:
            with graceful() as should_stop:
                _repeat(
                    lambda: _sync(following, as_json=as_json),
                    seconds,
                    should_stop,
                    at_once=True,
                    give_up=False,
                )


def _serve(following: "FollowerFolder", seconds: float, settings: dict[str, Any], *, as_json: bool) -> None:
    """Answers searches, while a thread keeps the copy in step."""
    from retrieval.cli import serve

    serve.require_packages()
    from retrieval.service.settings import Settings

    if not following.has_state:
        _print_synced(following.sync(), as_json=as_json, log=True)
    ended = threading.Event()
    keep = threading.Thread(
        target=_repeat,
        args=(lambda: _sync(following, as_json=as_json, log=True), seconds, ended.is_set),
        kwargs={"at_once": True, "give_up": False},
        name="faceprint-follow",
    )
    with ExitStack() as stack:
        keep.start()
        stack.callback(keep.join)
        stack.callback(ended.set)
        serve.run(Settings(following.folder, **settings))


def _sync(following: "FollowerFolder", *, as_json: bool, log: bool = False) -> None:
    done = following.sync()
    if done.changed:
        _print_synced(done, as_json=as_json, log=log)


def _print_synced(done: "Synced", *, as_json: bool, log: bool = False) -> None:
    """Prints which state a folder has; with `log` on standard error, beside the log of the service."""
    if as_json:
        typer.echo(_line(asdict(done)), err=log)
        return
    fetched = (
        f"{terminal.counted(done.objects_fetched, 'object')} fetched ({terminal.size(done.bytes_fetched)})"
    )
    said = (
        f"{done.folder} has state {done.number:,}: {terminal.counted(done.faces, 'face')}, revision "
        f"{done.revision:,}; {fetched}"
    )
    if log:
        typer.echo(said, err=True)
    else:
        terminal.console().print(terminal.text(said))


def published(
    address: _Address,
    remove_follower: Annotated[str | None, typer.Option("--remove-follower", metavar="NAME", help="Remove a follower that is gone for good from the list.", show_default=False)] = None,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Show what is published at an address, its followers, and who confirmed what was forgotten."""
    from retrieval.replication import status
    from retrieval.replication.objects import open_objects

    objects = open_objects(address)
    if remove_follower is not None:
        status.remove_follower(objects, remove_follower)
    found = status.publication_status(objects)
    if as_json:
        print_json(asdict(found))
        return
    followers = [
        f"{one.name}: {'current' if one.is_current else f'state {one.number:,}' if one.number else 'fetches its first state'}, "
        f"seen {one.seen_seconds:,.0f} s ago"
        for one in found.followers
    ]
    erasures = [_of_erasure(one) for one in found.erasures]
    terminal.print_facts(
        f"Published at {found.address}",
        {
            "state": f"{found.number:,}, revision {found.revision:,}, {terminal.counted(found.faces, 'face')}",
            "publisher": f"{found.publisher}, seen {found.age_seconds:,.0f} s ago",
            "gallery": found.gallery,
            "followers": followers or "none",
            "erasures": erasures or "none",
        },
    )


def _repeat(
    work: Callable[[], None],
    seconds: float,
    should_stop: Callable[[], bool],
    *,
    at_once: bool = False,
    give_up: bool = True,
) -> None:
    """Does a work again and again. An error is a line on standard error, and the work is tried again.

    Args:
        work: the work.
        seconds: from the end of one to the beginning of the next.
        should_stop: whether to end.
        at_once: do not wait before the first.
        give_up: end with an error that trying again does not mend.
    """
    said, wait = "", not at_once
    while True:
        end = time.monotonic() + seconds
        while wait and not should_stop() and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        wait = True
        if should_stop():
            return
        try:
            work()
            said = ""
        except FaceprintError as error:
            if give_up and isinstance(error, InputError | GalleryReplaced):
                raise
            if str(error) != said:
                said = str(error)
                typer.echo(f"faceprint: {said} Trying again.", err=True)


def _line(value: dict[str, Any]) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


def _seconds(text: str, option: str) -> float:
    found = _DURATION.fullmatch(text.strip())
    seconds = 0.0 if found is None else float(found[1]) * _UNITS[found[2]]
    options.require(
        0 < seconds <= 366 * 86400, f"{option} is {text[:40]!a}; give a time such as 30s, 5m or 1h"
    )
    return seconds
