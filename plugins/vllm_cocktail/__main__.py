"""`python -m vllm_cocktail`: writes a manifest for a vLLM server that has no gateway, and prints how to start it."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pydantic import ByteSize, TypeAdapter, ValidationError

from cocktail_serve.config import PoolConfig, Source, StoreConfig, VLLMEngineConfig
from cocktail_serve.dtypes import DType
from cocktail_serve.errors import ClientError
from vllm_cocktail.launch import CPU_VARIABLES, WORKER_EXTENSIONS, is_cpu_build, plugin_allowlist
from vllm_cocktail.manifest import MANIFEST_VARIABLE, Manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the models against each other, writes the manifest, prints the start line.

    Returns:
        Exit code: 0, or 2 for models that cannot be mixed.
    """
    args = _parser().parse_args(argv)
    from cocktail_serve.checkpoints.opening import open_pool

    try:
        config = PoolConfig(
            id="manifest",
            kind="decoder",
            base=Source(path=str(args.base.resolve())),
            experts={name: Source(path=str(folder.resolve())) for name, folder in args.expert},
            engine=VLLMEngineConfig(),
        )
        pool = open_pool(config, cache_dir=args.cache_dir.expanduser())
    except (ClientError, ValidationError) as error:
        print(error, file=sys.stderr)
        return 2
    dtype: DType = args.dtype or pool.base.dtype
    manifest = Manifest.of_pool(
        pool, dtype=dtype, cache_bytes=args.cache_bytes, managed=False, expert_bytes=args.expert_memory
    )
    path = manifest.write(args.out.resolve())
    for member in pool:
        print(f"{member.name:20} {member.fingerprint}  {member.path}")
    variables = {MANIFEST_VARIABLE: str(path), "VLLM_PLUGINS": plugin_allowlist(None)}
    model = shlex.quote(str(pool.base.path))
    command = f"vllm serve {model}"
    if is_cpu_build():  # whose `vllm` command fails, see `server_args`
        variables |= CPU_VARIABLES
        command = f"python -m vllm.entrypoints.openai.api_server --model {model} --enforce-eager"
    print("\n" + " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items()) + " \\")
    print(f"{command} --dtype {dtype} --worker-extension-cls {WORKER_EXTENSIONS[pool.mode]}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vllm_cocktail", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model, which vLLM serves")
    parser.add_argument(
        "--expert", type=_named_folder, action="append", default=[], metavar="NAME=FOLDER", help="may be repeated"
    )
    parser.add_argument("--dtype", choices=get_args(DType), help="the engine's dtype; default: as the base is stored")
    parser.add_argument(
        "--cache-bytes", type=_byte_size, default=_byte_size("2GiB"), help="merged parameters kept in memory (2GiB)"
    )
    parser.add_argument(
        "--expert-memory",
        type=_byte_size,
        default=0,
        help="models kept in the engine's own layout, to mix in place; on a GPU bound the KV cache too (0)",
    )
    parser.add_argument(
        "--cache-dir",
        type=Path,
        default=StoreConfig().cache_dir,
        help="where fingerprints of files are kept (%(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    return parser


def _named_folder(text: str) -> tuple[str, Path]:
    name, separator, folder = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(folder)


def _byte_size(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, such as 500MB or 2GiB") from None


if __name__ == "__main__":
    sys.exit(main())
