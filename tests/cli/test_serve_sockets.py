"""`virtio serve`: where front-ends are, by path and descriptor, as server and client; and sockets that cannot be had."""

import socket
import subprocess
from pathlib import Path

import pytest

from tests.cli.run import LIMIT, command, environment, failed, run
from tests.cli.serving import SPLIT, Remote, read, serving, with_ring


def test_sockets_that_cannot_be_had(path: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")

    def line(*words: str, code: int = 1) -> str:
        return failed(run("serve", "rng", *words), code)

    assert "No such file" in line("--socket-path", str(tmp_path / "missing" / "s"))
    assert "it exists and is not a socket" in line("--socket-path", str(plain))
    assert "it is not a socket" in line("--socket-path", str(plain), "--client")
    assert "socket path of 108 bytes, not 1 to 107" in line("--socket-path", "x" * 108, code=2)
    assert "socket path of 0 bytes" in line("--socket-path", "", code=2)
    assert "either --socket-path or --fd is needed" in line(code=2)
    assert "not both" in line("--socket-path", str(path), "--fd", "3", code=2)
    assert "--client is for --socket-path" in line("--fd", "3", "--client", code=2)
    assert "descriptor 99 is not a socket" in line("--fd", "99")
    assert "descriptor 0 is not a socket" in line("--fd", "0")
    assert "'-1'" in line("--fd", "-1", code=2) or "-1 is not in the range" in line("--fd", "-1", code=2)
    with serving("rng", "--socket-path", str(path)) as served:
        assert f"cannot listen on {path}: it is in use" in line("--socket-path", str(path))
        served.end()
    with serving("rng", "--socket-path", str(path)) as served:  # its socket stays behind
        served.process.kill()
        served.process.wait(LIMIT)
    assert path.is_socket()
    with serving("rng", "--socket-path", str(path)) as served, with_ring(path) as frontend:
        assert len(read(frontend, 8)) == 8
        served.end()
    tcp = socket.socket()
    with tcp:
        done = subprocess.run(
            command("serve", "rng", "--fd", str(tcp.fileno())), pass_fds=[tcp.fileno()], capture_output=True, text=True, env=environment()
        )
    assert "is not a Unix stream socket, but AF_INET" in failed(done, 1)


@pytest.mark.parametrize("listening", [True, False], ids=["listening", "connected"])
def test_a_descriptor_is_the_socket(path: Path, listening: bool) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        ours = theirs = None
        if not listening:
            ours = socket.socket(socket.AF_UNIX)
            ours.connect(str(path))
            theirs, _ = listener.accept()
        passed = (listener if theirs is None else theirs).fileno()
        with serving("rng", "--fd", str(passed), pass_fds=[passed]) as served:
            assert served.seen[0]["socket"] == f"descriptor {passed}"
            if theirs is not None:
                theirs.close()
            with Remote.to(path) if ours is None else Remote(ours) as frontend:
                frontend.negotiate(SPLIT)
                frontend.start(frontend.queue(0))
                assert len(read(frontend, 8)) == 8
            if listening:
                served.until("disconnected")
                served.end()
            else:
                assert [event["event"] for event in served.ended()][-2:] == ["disconnected", "end"]


def test_as_a_client_it_connects_again_and_again(path: Path) -> None:
    with serving("rng", "--socket-path", str(path), "--client") as served:
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen()
                listener.settimeout(60)
                connected, _ = listener.accept()
                with Remote(connected) as frontend:
                    frontend.negotiate(SPLIT)
                    frontend.start(frontend.queue(0))
                    assert len(read(frontend, 8)) == 8
            path.unlink()
            served.until("disconnected")
        served.end()
