"""Resumes streams that broke after the client had received a part of the answer.

If only the closing events are missing, the gateway sends them. Otherwise another pair continues from the last token
that the client has, or the stream ends with an error that says why it cannot be continued.
"""

from __future__ import annotations

import logging

from pd_proxy.errors import BackendError, StreamInterrupted
from pd_proxy.flow.request import Request
from pd_proxy.relay.transcript import Transcript
from pd_proxy.requests.continuation import UNTRIED, Continuation, choices, has_tools, inexact
from pd_proxy.settings.tree import Settings
from pd_proxy.telemetry.records import Stage

log = logging.getLogger("pd_proxy.flow")


class Resumption:
    """The rules by which streams are resumed."""

    def __init__(self, settings: Settings) -> None:
        self._mode = settings.resume
        self._most = settings.retries.resumes
        self._limit = settings.limits.transcript

    def prepare(self, request: Request) -> None:
        """Decide before a stream's first try whether it could be resumed, and whether that needs token ids."""
        reason = "off" if self._mode == "off" else inexact(request.body)
        hopeless = reason and (self._mode != "best_effort" or reason in (request.body.unsplittable, UNTRIED))
        request.token_ids = not hopeless
        # An engine's parser for tool calls may hold back a part of a token's text.
        with_text = not hopeless and has_tools(request.body)
        request.transcript = Transcript(
            reason,
            limit=self._limit,
            with_text=with_text,
            choices=choices(request.body) if request.body.unsplittable else 1,
        )

    def disable(self, request: Request) -> None:
        """Disable resuming for a request, since the engines of its try cannot continue from token ids."""
        request.token_ids = False
        if request.transcript is not None:
            request.transcript.mark_inexact("connector")

    def complete(self, request: Request) -> bool:
        """End an answer if the client has every token of it. Returns whether it has."""
        transcript, body = request.transcript, request.body
        assert transcript is not None
        if transcript.finished:
            if not transcript.whole:
                return False  # another of its choices has not ended
            if body.wants_usage and not transcript.continuable:
                return False
            closing = transcript.closing(usage=body.wants_usage)
        elif body.max_tokens is not None and transcript.continuable and transcript.said >= body.max_tokens:
            closing = transcript.closing(finish="length", usage=body.wants_usage)
        else:
            return False
        if transcript.continuable:
            request.record.tokens = transcript.total
            request.record.prompt_tokens = transcript.prompt_tokens
        request.client.end(closing)
        record = request.record
        log.info(
            "%s: its backend failed after the last token: %s", record.request_id, request.error, extra=record.known_as
        )
        return True

    def resume(self, request: Request, error: BackendError, no_resume_point: str) -> None:
        """Prepare a request for a try that continues where its answer broke off.

        Arguments:
            no_resume_point: why no resume point was found, or empty.
        Raises:
            StreamInterrupted: it cannot be continued.
        """
        transcript = request.transcript
        assert transcript is not None
        if why := self._why_not(request, error, transcript, no_resume_point):
            raise self.given_up(request, why) from error
        request.record.reach(Stage.RESUMING)
        ids = transcript.truncate()
        request.continuation = Continuation(ids, transcript.said)
        request.resumes += 1
        request.record.resumes.append(error.reason)
        log.warning(
            "%s: stream broken after %d tokens, resumed elsewhere: %s",
            request.record.request_id,
            transcript.said,
            error,
            extra=request.record.known_as,
        )

    def given_up(self, request: Request, why: str) -> StreamInterrupted:
        """The error that ends a stream that cannot be continued."""
        request.record.not_resumed = why
        return StreamInterrupted(f"{request.error}; not resumed: {why}", why=why)

    def _why_not(self, request: Request, error: BackendError, transcript: Transcript, no_resume_point: str) -> str:
        if not error.retryable:
            return error.reason
        if not transcript.continuable:
            return transcript.inexact or "no_token_ids"
        if transcript.inexact and self._mode != "best_effort":
            return transcript.inexact
        if request.body.media:
            return "media"
        if transcript.dropped and (request.body.wants_token_ids or "logprobs" in request.body.members):
            no_resume_point = "merged_tokens"  # their ids, or their logprobs, would be sent twice
        if no_resume_point and self._mode != "best_effort":
            return no_resume_point
        if request.resumes >= self._most:
            return "too_often"
        return ""
