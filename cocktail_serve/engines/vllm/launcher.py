"""How the server of a decoder pool is started: command line, environment, and the manifest that its workers read."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from cocktail_serve.checkpoints.unchanged import check_unchanged
from cocktail_serve.config import VLLMEngineConfig
from cocktail_serve.dtypes import DType
from cocktail_serve.engines.start_failures import reason_in
from cocktail_serve.engines.vllm.fake import fake_args
from cocktail_serve.errors import ConfigError, StorageError
from cocktail_serve.pool import Pool
from vllm_cocktail.launch import check_args, server_args, server_env
from vllm_cocktail.manifest import Manifest

CHECK_TIMEOUT_S = 300.0
"""How long `check` may take; most of it is importing, which a busy machine makes long."""


class Launcher:
    """Prepares each life of one pool's server; starts nothing itself.

    Args:
        pool: its base and id are read here; what experts it has may change, see `write_manifest`.
        run_dir: folder for the manifest and the server's log.

    Attributes:
        log: file for the server's output.
        resident: digest of the recipe that the server starts with.

    Raises:
        ConfigError: `args` or `env` set what is set here.
    """

    def __init__(self, pool: Pool, config: VLLMEngineConfig, *, dtype: DType, run_dir: Path) -> None:
        self.log = run_dir / f"{pool.id}.log"
        self._pool_id = pool.id
        self._base = pool.base
        self._mode = pool.mode
        self._config = config
        self._dtype = dtype
        self._manifest_path = run_dir / f"{pool.id}.manifest.json"
        self.resident = self._manifest_of(pool).resident
        self.command_and_env(
            Path("engine.sock"), ""
        )  # a configuration that cannot be used fails here, not in the background

    def write_manifest(self, pool: Pool) -> None:
        """Writes which models the server may mix. A running server's workers read it again when a recipe names a model
        that they do not know.

        Raises:
            StorageError: it cannot be written; the file is as it was.
        """
        manifest = self._manifest_of(pool)
        try:
            self._manifest_path.parent.mkdir(parents=True, exist_ok=True)
            manifest.write(self._manifest_path)
        except OSError as error:
            raise StorageError(f"cannot write the engine's manifest {self._manifest_path}: {error}") from error

    def check_base(self) -> None:
        """Looks at the base's files, which the server is about to load. Blocks.

        Raises:
            ModelChangedError: they are not what recipes call by their name.
        """
        if self._config.type == "vllm":  # the fake of it loads none
            check_unchanged(self._base)

    def command_and_env(self, socket: Path, key: str) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of one life; a `server.Launch`."""
        config = self._config
        is_fake = config.type != "vllm"
        if is_fake:
            command = fake_args(
                uds=socket, served_model_name=self._pool_id, max_model_len=config.max_model_len, extra=config.args
            )
        else:
            command = server_args(
                model=self._base.path,
                uds=socket,
                served_model_name=self._pool_id,
                dtype=self._dtype,
                max_model_len=config.max_model_len,
                # requests reach the server through the gateway alone, whose field policy decides on theirs; what comes
                # here is the template of the model that was asked for
                extra={**config.args, "trust-request-chat-template": True},
                expert_bytes=int(config.expert_memory),
                mode=self._mode,
            )
        env = server_env(
            manifest=self._manifest_path,
            api_key=key,
            owner_pid=os.getpid(),
            args={} if is_fake else config.args,
            extra=config.env,
            mode=self._mode,
        )
        return command, env

    def check(self, pool: Pool) -> list[str]:
        """Has vLLM say what it makes of the command line, in a process of its own. Blocks, some ten seconds.

        Returns:
            What vLLM would start with, and would not heed.

        Raises:
            ConfigError: a server would not start; says why.
            StorageError: as `write_manifest`.
        """
        if self._config.type != "vllm":
            return []
        self.write_manifest(pool)
        command, env = self.command_and_env(Path("engine.sock"), "")
        try:
            checked = subprocess.run(
                check_args(command), env=env, capture_output=True, text=True, timeout=CHECK_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"vLLM did not say within {CHECK_TIMEOUT_S:g} s whether it would start") from error
        warnings: list[str] = []
        try:
            told = json.loads(checked.stdout.splitlines()[-1])
            reason, warnings = told["reason"], told["warnings"]
        except (IndexError, ValueError, TypeError, KeyError):
            lines = checked.stderr.splitlines()
            reason = reason_in(lines) or f"its process ended with code {checked.returncode}: {' '.join(lines[-1:])}"
        if reason is not None:
            raise ConfigError(
                f"vLLM does not start on {self._base.path}: {reason}; mend the pool's 'engine' section, or its base"
            )
        return warnings

    def _manifest_of(self, pool: Pool) -> Manifest:
        return Manifest.of_pool(
            pool,
            dtype=self._dtype,
            cache_bytes=int(self._config.cache_bytes),
            managed=True,
            expert_bytes=int(self._config.expert_memory),
        )
