"""Memory of a server's process: nobody waits for what compiling and loading left.

glibc's allocator gives threads arenas of their own, and XLA compiles in the thread that
asks. Afterwards that thread's arena is full of free pieces in thousands of sizes, which
are looked through whenever memory is needed: a call of a small round on a CPU took 80
ms in such a thread, and 64 in another.

Python looks for cycles of garbage among everything it has. What a server has when it is
ready (modules, traced programs: half a million objects) stays; to look through it takes
a quarter of a second, for which all outputs stand still.
"""

import gc
import threading
from collections.abc import Callable
from concurrent.futures import Future


class Apart[T](threading.Thread):
    """Work that is done in a thread of its own, which ends with it.

    Settings that belong to a thread, such as the mesh in use, are for `work` to make.
    """

    def __init__(self, work: Callable[[], T]):
        """Begins it."""
        super().__init__(name="apart")
        self._work, self._outcome = work, Future[T]()
        self.start()

    def run(self) -> None:
        """Does it."""
        try:
            self._outcome.set_result(self._work())
        except BaseException as error:
            self._outcome.set_exception(error)

    def result(self) -> T:
        """What the work gave, or raised, once the thread has ended."""
        self.join()
        return self._outcome.result()


def keep_everything() -> None:
    """Garbage is no more looked for among the objects that there are now."""
    gc.collect()
    gc.freeze()
