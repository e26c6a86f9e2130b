"""pd-proxy: a prefill-decode disaggregation gateway for LLM serving. `docs/architecture.md` names the rooms."""

__version__ = "0.3.0"
