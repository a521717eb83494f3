"""Fingerprints of what a server serves, with and without LoRA."""

from typing import Any

from deltamem_vllm.api.settings import ServerSettings
from deltamem_vllm.engine.settings import adapter_of
from deltamem_vllm.state.fingerprint import FingerprintParts, fingerprint
