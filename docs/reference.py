"""Write the reference pages from the code, beside this file: settings.md, metrics.md, errors.md and findings.md.

python docs/reference.py            writes them
python docs/reference.py --check    exits 1 when one of them is not what the code says now
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pd_proxy import errors  # noqa: E402 - the checkout's own package, installed or not
from pd_proxy.admission.admission import Admission  # noqa: E402
from pd_proxy.fleet.findings import ADVICE, MEANING, SIDE_ADVICE  # noqa: E402
from pd_proxy.fleet.fleet import Fleet  # noqa: E402
from pd_proxy.fleet.view import FleetView  # noqa: E402
from pd_proxy.flow.decisions import Decisions  # noqa: E402
from pd_proxy.http.client_connections import Connections  # noqa: E402
from pd_proxy.prefix.index import PrefixIndex  # noqa: E402
from pd_proxy.settings.bounds import ClientSettings  # noqa: E402
from pd_proxy.settings.environment import CONFIG_VARIABLE, DEFAULTS_VARIABLE, variable  # noqa: E402
from pd_proxy.settings.flags import flag  # noqa: E402
from pd_proxy.settings.tree import Settings, leaves  # noqa: E402
from pd_proxy.settings.types import Group  # noqa: E402
from pd_proxy.telemetry.admission import AdmissionSink  # noqa: E402
from pd_proxy.telemetry.old_names import OLD_NAMES  # noqa: E402
from pd_proxy.telemetry.placement import PlacementSink  # noqa: E402
from pd_proxy.telemetry.prometheus import PrometheusSink  # noqa: E402
from pd_proxy.telemetry.records import PrefixCounts  # noqa: E402

NONE = "\N{EN DASH}"
NOTE = "<!-- Written by docs/reference.py from the code. Do not edit; run it again. -->\n"

LABELS = {
    "backend": "URL of a configured backend",
    "client": "a client's name in the settings; `key-1`, `key-2`, … for those of `api_keys`; `anonymous` without keys",
    "code": "of the error: `queue_full`, `deadline_too_close`, `queue_timeout`, `target_missed`, "
    "`rate_limit_exceeded`, `too_many_tokens` or `draining`",
    "decision": "its reason: the name of a policy, or one of the rules of `auto`; for a local prefill also a "
    "fallback's reason; `none` where no backend could be chosen ([explain](explain.md))",
    "endpoint": "`chat`, `completions`, `messages`, `responses`, `generate`, `sglang_generate`, "
    "or a one-leg route: `embeddings`, "
    "`rerank`, `score`, `pooling`, `classify`, `moderations`, `transcriptions`, `translations`, `tokenize`, "
    "`detokenize`, `count_tokens`, `render`, `batch`",
    "group": "`default`, or the name of one of `groups`",
    "kind": "`prompt`, `cached` (tokens of the prompt that prefill had in its cache) or `completion`",
    "leg": "`prefill`, `decode` or `encode`",
    "message": "`notice`, `registration`, `kv_batch` or `kv_event`",
    "model": "a model that some backend has; any other is `other`",
    "outcome": "of a request: `ok`, `client_gone`, or the code of the error that ended it ([errors](errors.md)); of a "
    "hand-off: `released` or `left_to_expire`",
    "pool": "`prefill`, `decode`, `mixed` or `encode`; `none` for a decision without a backend",
    "reason": "of a retry: the error's reason ([errors](errors.md)); of a fallback: `no_prefill_backend`, "
    "`no_decode_backend`, `no_matching_pair` ([models](models.md#revisions)), `no_handoff_params`, "
    "`handoff_invalid`, `prefill_failed`, `handoff_failed`, `no_encode_backend`, `encode_failed`, or the request "
    "field that keeps it from being split (`n`, `prompt_list`, `echo`, …); of an ejection: `consecutive`, "
    "`success_rate`, `slow`, `leaving` ([operating](operating.md#the-breaker)); of a first token: "
    "[first token](first-token.md); of an ignored health check: `mass_failure` or `gateway_delayed` "
    "([operating](operating.md#mass-failure))",
    "result": "of a warm-up: `ok`, or [what is wrong with the pair](findings.md); of a message: `taken` (accepted); "
    "`garbage` (malformed); of a notice: `unexpected` (no request waits for it); of a registration: `unknown` (it "
    "belongs to no backend that registers) or `refused` (its engine may not send it); of KV events: "
    "[KV events](kv-events.md#metrics)",
    "source": "`prefill` or `decode`",
    "stage": "`admission`, `encode`, `prefill`, `decode` (before the first token) or `stream` (after it)",
    "state": "`up`, `slow_start`, `ejected`, `draining` or `down`",
    "version": "the gateway's version",
}
"""The values of each label. A label of the code that is missing here is an error, and so is one too many."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pages, or check them. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the reference pages from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is stale")
    arguments = parser.parse_args(argv)
    stale = [name for name, text in pages().items() if not is_fresh(HERE / name, text)]
    for name in stale:
        if arguments.check:
            print(f"docs/{name} is stale; run: python docs/reference.py", file=sys.stderr)
        else:
            (HERE / name).write_text(pages()[name], encoding="utf-8")
            print(f"docs/{name} written")
    return 1 if stale and arguments.check else 0


def is_fresh(path: Path, text: str) -> bool:
    """Whether a page already has this text."""
    return path.exists() and path.read_text(encoding="utf-8") == text


def pages() -> dict[str, str]:
    """Every page's text by its file name."""
    return {
        "settings.md": settings_page(),
        "metrics.md": metrics_page(),
        "errors.md": errors_page(),
        "findings.md": findings_page(),
    }


# ------------------------------------------------------------------------------------------------------ findings


def findings_page() -> str:
    rows = [(f"`{code}`", MEANING[code], advice) for code, advice in ADVICE.items()]
    named = [(f"`{connector}`", advice) for connector, advice in SIDE_ADVICE.items()]
    return "\n".join(
        [
            NOTE,
            "# Findings\n",
            "For operators: what `pd-proxy doctor` says about engines, and what to do.\n",
            "[`pd-proxy doctor`](operating.md#doctor), [warm-ups](operating.md#warm-up) and `GET /admin/backends` "
            "report these faults of engines and pairs, by their codes.\n",
            table(("code", "meaning", "what to do"), rows),
            "For `side_channel` the advice depends on the connector:\n",
            table(("connector", "what to do"), named),
        ]
    )


# ------------------------------------------------------------------------------------------------------ settings


def settings_page() -> str:
    groups: dict[str, list[tuple[str, FieldInfo]]] = {}
    for name, field in leaves():
        groups.setdefault(name.rpartition(".")[0], []).append((name, field))
    parts = [
        NOTE,
        "# Settings\n",
        "For operators: every setting, with its names, default and meaning.\n",
        "A setting has one name in the file, in the environment and as a flag of `pd-proxy serve`, where hyphens stand "
        "for its underscores. Flags override variables, and variables override the file. Unknown names are refused in "
        "all three. `pd-proxy check FILE` reports the errors of a file with their lines.\n",
        f"The file is named by `--config` or by the variable `{CONFIG_VARIABLE}`. Lists are YAML lists in the file; "
        "in a variable they are separated by commas; a flag may be repeated.\n",
        f"`{DEFAULTS_VARIABLE}` has settings that the file overrides, `name=value` separated by commas: for images. A "
        "secret may be `file:PATH` or `env:NAME` everywhere; an empty one is an error.\n",
        "The reasons for the defaults are in [config/pd-proxy.yaml](../config/pd-proxy.yaml).\n",
    ]
    for group, fields in groups.items():
        parts.append(f"## {group or 'General'}\n")
        if group:
            kind = Settings.model_fields[group].annotation
            text = inspect.getdoc(kind) if isinstance(kind, type) else None
            if text and text != inspect.getdoc(Group):
                parts.append(f"{text}\n")
        rows = [
            (
                f"`{name}`",
                f"`{variable(name)}`",
                f"`{flag(name)}`",
                default(field),
                meaning(field),
            )
            for name, field in fields
        ]
        parts.append(table(("name", "variable", "flag", "default", "meaning"), rows))
    parts.append("## clients[]\n")
    parts.append(
        "`clients` is a list of these; as a variable or a flag it is JSON. Names and keys differ from each other and "
        "from those of `api_keys`.\n"
    )
    members = [(f"`{name}`", default(field), meaning(field)) for name, field in leaves(ClientSettings)]
    parts.append(table(("member", "default", "meaning"), members))
    return "\n".join(parts)


def default(field: FieldInfo) -> str:
    """A setting's default, as in a settings file."""
    value = field.default
    if value is PydanticUndefined or value in (None, (), {}, ""):
        return NONE
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def meaning(field: FieldInfo) -> str:
    """A setting's description, and its possible values where they are few."""
    text = field.description or ""
    values = choices(field.annotation)
    if values:
        text += ": " if ":" not in text else "; "
        text += ", ".join(f"`{value}`" for value in values)
    if SecretStr in arguments_of(field.annotation):
        text += " (secret: never shown)"
    return text


def choices(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def arguments_of(annotation: Any) -> set[Any]:
    """A type and all the types within it."""
    return {annotation}.union(*(arguments_of(part) for part in get_args(annotation) if not isinstance(part, str)))


# ------------------------------------------------------------------------------------------------------- metrics


def metrics_page() -> str:
    settings = Settings.model_construct(**no_backends())
    fleet = Fleet(settings)
    placement = PlacementSink(Decisions(), PrefixIndex(), PrefixCounts(), fleet)
    sinks = (PrometheusSink(FleetView(fleet), Connections()), AdmissionSink(Admission(settings)), placement)
    families = [family for sink in sinks for family in sink.collect()]
    used = sorted({label for family in families for label in family._labelnames})  # type: ignore[attr-defined]
    if used != sorted(LABELS):
        raise SystemExit(f"reference.py: LABELS must describe exactly {', '.join(used)}")
    rows = [
        (
            f"`{family.name}{'_total' if family.type == 'counter' else ''}`",
            family.type,
            ", ".join(f"`{label}`" for label in family._labelnames) or NONE,  # type: ignore[attr-defined]
            family.documentation,
        )
        for family in families
    ]
    return "\n".join(
        [
            NOTE,
            "# Metrics\n",
            "For operators: every metric of the gateway, with its labels.\n",
            "`GET /metrics` answers in Prometheus' text format, or in OpenMetrics if requested, on the main port or "
            "on `metrics.port`. Times are in seconds, as the client sees them. The usual `process_*` and `python_info` "
            "are there as well.\n",
            table(("name", "type", "labels", "meaning"), rows),
            "## Labels\n",
            "The number of label values stays bounded, whatever clients send.\n",
            table(("label", "values"), [(f"`{label}`", LABELS[label]) for label in used]),
            "## Old names\n",
            "These metrics were renamed in 0.4.0. Both names are shown while `metrics.old_names` is true; 0.5.0 will "
            "have the new ones only.\n",
            table(("old", "new"), old_names({family.name: family.type for family in families})),
            "[operating.md](operating.md) has queries to begin with.\n",
        ]
    )


def old_names(types: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """The old and the new name of each renamed metric, with the labels and label values that differ."""
    for new, old in OLD_NAMES.items():
        ending = "_total" if types[new] == "counter" else ""
        before, after = [], []
        for label, old_label in old.labels.items():
            before.append(f"label `{old_label}`")
            after.append(f"label `{label}`")
        for value, old_value in old.values.items():
            before.append(f"value `{old_value}`")
            after.append(f"value `{value}`")
        yield ", ".join([f"`{old.name}{ending}`", *before]), ", ".join([f"`{new}{ending}`", *after])


def no_backends() -> dict[str, Any]:
    """The settings' defaults, without those of the environment."""
    return {name: field.default for name, field in Settings.model_fields.items()}


# -------------------------------------------------------------------------------------------------------- errors


def errors_page() -> str:
    doc = inspect.getdoc(errors) or ""
    tree = "\n".join(line.removeprefix("    ") for line in doc.splitlines() if line.startswith("    "))
    rows = [
        (
            f"`{kind.__name__}`",
            status_of(kind),
            f"`{kind.type}`",
            f"`{kind.code}`",
            f"`{kind.reason}`" if issubclass(kind, errors.BackendError) else NONE,
            "yes" if kind.retryable else "no",
            read_by_client(kind),
        )
        for kind in subclasses(errors.GatewayError)
    ]
    return "\n".join(
        [
            NOTE,
            "# Errors\n",
            "For client developers and operators: every error that the gateway answers with.\n",
            "Every error has OpenAI's shape, so that clients' libraries understand it, and on `/v1/messages` "
            "Anthropic's ([routes](generating-routes.md#errors)):\n",
            '```json\n{"error": {"message": "…", "type": "…", "param": null, "code": "…"}}\n```\n',
            "An answer that has not begun gets the status. A stream that has begun gets the same object as its last "
            "event, and no `[DONE]`. Every answer has an `x-request-id`: the client's own, if it sent a valid one. "
            "Messages that name backends go to the log; a client gets the cause, but no addresses.\n",
            "## Tree\n",
            f"```text\n{tree}\n```\n",
            "## Table\n",
            "*Retried*: the gateway tries again on other backends, as long as the client has got nothing and "
            "tries are left (`retries.attempts`). *Reason* is the label in `pd_proxy_retries_total`.\n",
            table(("class", "status", "type", "code", "reason", "retried", "message for the client"), rows),
        ]
    )


def subclasses(kind: type[errors.GatewayError]) -> Iterable[type[errors.GatewayError]]:
    """A class and all its subclasses, in the order of the file."""
    yield kind
    for below in kind.__subclasses__():
        yield from subclasses(below)


def status_of(kind: type[errors.GatewayError]) -> str:
    return "the engine's" if issubclass(kind, errors.BackendAnswered) else str(kind.status)


def read_by_client(kind: type[errors.GatewayError]) -> str:
    if issubclass(kind, errors.BackendAnswered):
        return f"the engine's own error if it may be passed on; else “{kind.public}”"
    if issubclass(kind, errors.BackendError):
        return f"“{kind.public}”"
    return "what is wrong with this request" if issubclass(kind, errors.ClientError) else "what happened"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
