"""The tests' proxy is as a line is: what the server does to a connection, the client sees."""

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.store.s3 import Proxy, read_head, status


@contextmanager
def server_of_one_answer_a_connection() -> Iterator[tuple[str, threading.Event]]:
    """Answers once on every connection, and closes it, unasked, when it is told to: as Node's servers do after 5 s."""
    close = threading.Event()

    def answer(client: socket.socket) -> None:
        with client, client.makefile("rb") as incoming:
            read_head(incoming)
            client.sendall(status(200, b"here"))
            close.wait()

    def accept(listening: socket.socket) -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, args=(listening,), daemon=True).start()
        try:
            yield "http://{}:{}".format(*listening.getsockname()), close
        finally:
            close.set()
            listening.shutdown(socket.SHUT_RDWR)


def test_a_connection_that_the_server_closes_is_closed_to_the_client() -> None:
    with server_of_one_answer_a_connection() as (address, close), Proxy(address).running() as proxy:
        host, port = proxy.address.removeprefix("http://").split(":")
        client = http.client.HTTPConnection(host, int(port), timeout=5)
        client.request("GET", "/a")
        assert client.getresponse().read() == b"here"
        close.set()
        assert client.sock.recv(1) == b""
        close.clear()
        client.close()
        client.request("GET", "/b")
        assert client.getresponse().read() == b"here"
        client.close()
