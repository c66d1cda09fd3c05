"""The protocols by name (`spec.PROTOCOLS` has the names): generate, loglikelihood, cloze, builtin.

A protocol is one `Protocol` value; the loop that asks, scores and records is `evaluate` and knows none by name.
"""

from __future__ import annotations

from dora_lab.evaluation.protocols.builtin import Builtin
from dora_lab.evaluation.protocols.instructed import Cloze, Generate, Loglikelihood
from dora_lab.evaluation.protocols.protocol import Protocol
from dora_lab.spec import Spec
from dora_lab.tasks import load_task

__all__ = ["PROTOCOLS", "Protocol", "ready"]
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol for protocol in (Generate(), Loglikelihood(), Cloze(), Builtin())
}


def ready(spec: Spec) -> None:
    """Raises LoadError now, not after days of training, for what the evaluation of `spec` needs and does not find."""
    for protocol in spec.evaluation.protocols:
        for task in spec.data.tasks:
            PROTOCOLS[protocol].ready(load_task(task))
