"""Sessions: what a turn leaves for the next one, and turns that were refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def keep_written_keys(original: Callable, self: Any, req: Any) -> bool:
    """AROUND ``StreamingSession.try_cache_finished_req``: the next turn starts behind the last written key.

    SGLang 0.5.23 counts every token of the turn as cached (``session/streaming_session.py:187``). The last
    one of a verify step has no key and value yet: the next step would write them, as its root. A turn that
    ends in mid-path has them for all of its tokens.
    """
    kv, written = req.kv, req.kv.kv_committed_len
    kept = original(self, req)
    if kept:
        kv.kv_committed_len = min(kv.kv_committed_len, written)
    return kept


def detach_refused(made: Any, session: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``Session.create_req``: a turn that a streaming session refuses has no part in it.

    SGLang 0.5.23 leaves it in the session (``session/session_controller.py:372``): beside the turn in
    progress it then takes the session's cache a second time, which ends the scheduler, or, when it goes,
    opens the session to a third turn while the first still runs on its cache.
    """
    if session.streaming and made.to_finish is not None:
        made.session = None
