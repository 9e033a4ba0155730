"""What runs inside vLLM: mixes recipes into the live parameters and fences the requests from them.

- `register`: entry point of `vllm.general_plugins`, run in every process of the server.
- `worker.CocktailWorkerExtension`: mixes, in the worker.
- `unmerged`: engines whose recipes share a batch: nothing is mixed, requests bring their coefficients.
- `routes.CocktailEndpointPlugin`: entry point of `vllm.endpoint_plugins`; control routes and fence, in the API server.
- `manifest`, `launch`, `fence`: no vLLM needed; the owner of the server uses them too.
"""


def register() -> None:
    """Prepares a process of the server. Entry point of `vllm.general_plugins`; cheap, and may run many times.

    Without an owner (plain vLLM) it only asks for AMX, so any process may load it.
    """
    import os

    import torch

    from vllm_cocktail.launch import is_cpu_build
    from vllm_cocktail.lifetime import die_with_owner
    from vllm_cocktail.manifest import MANIFEST_VARIABLE, OWNER_VARIABLE, Manifest
    from vllm_cocktail.waiting import nap_while_waiting

    if hasattr(torch.cpu, "_init_amx"):
        # the kernels of vLLM use AMX tiles, which Linux grants per process and only when asked (else SIGILL)
        torch.cpu._init_amx()
    die_with_owner()
    if OWNER_VARIABLE in os.environ and is_cpu_build():
        nap_while_waiting()
    if MANIFEST_VARIABLE in os.environ and Manifest.from_environ().mode == "unmerged":
        from vllm_cocktail.unmerged.worker import hold_factors_once_loaded

        hold_factors_once_loaded()
