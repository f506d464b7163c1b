"""An object store in this process's memory that fails when a test says so: `flaky://NAME`."""

from collections.abc import Callable
from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FlakyBucket(MemoryFileSystem):
    """`fault` is asked before each request, by the file's path; what it raises is the failure.

    `answer` is asked after each upload.
    """

    protocol = "flaky"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    fault: ClassVar[Callable[[str], None]] = print
    answer: ClassVar[Callable[[str], None]] = print
    sent: ClassVar[list[str]] = []

    @classmethod
    def forget(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.sent.clear()
        cls.fault = staticmethod(lambda path: None)
        cls.answer = staticmethod(lambda path: None)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def put_file(self, lpath, rpath, **options):
        type(self).fault(rpath)
        super().put_file(lpath, rpath, **options)
        type(self).answer(rpath)
        self.sent.append(rpath)


def after_fault(name: str):
    """The request of that name to the store in memory, which the fault may forbid. Its path is its first argument."""
    plain = getattr(MemoryFileSystem, name)
    return lambda store, path, *rest, **options: type(store).fault(path) or plain(store, path, *rest, **options)


for request in ("get_file", "rm_file", "exists", "cat_file"):
    setattr(FlakyBucket, request, after_fault(request))
fsspec.register_implementation("flaky", FlakyBucket, clobber=True)
