"""Recovery: fine-tune a pruned model, with LoRA or whole, on text, instructions or a teacher."""

from prunekit.recovery.adapters import detach
from prunekit.recovery.result import RecoveryResult
from prunekit.recovery.settings import Recovery
from prunekit.recovery.training import prepare, recover

__all__ = ["Recovery", "RecoveryResult", "detach", "prepare", "recover"]
