"""Adapters that are served though no job here trained them: named at the start, or loaded by a request (vLLM's
/v1/load_lora_adapter). Each is copied, so that what is served never changes under a name; a restart forgets them.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from coserve_agent.adapters.registry import AdapterRegistry
from coserve_agent.chat import variables
from coserve_agent.engine.client import AdapterLoadError
from coserve_agent.errors import EngineGoneError, StartError
from coserve_agent.http.errors import ApiError, bad_request
from coserve_api.common import ModelName
from coserve_contract.messages import AdapterRecord
from coserve_engine.errors import AdapterFolderError, CheckpointError
from coserve_engine.formats.adapter_config import ADAPTER_CONFIG, read_adapter_config
from coserve_engine.formats.adapter_folder import ADAPTER_WEIGHTS
from coserve_engine.formats.folders import seal_folder
from coserve_engine.formats.opened import opened

log = logging.getLogger(__name__)

FOLDER = "loaded"
"""Below the artifact store."""
MOST = 1000
"""That are loaded at a time."""
INVALID = "invalid_value"
_NAME: TypeAdapter[str] = TypeAdapter(ModelName)


class LoadedAdapters:
    """Those of one server.

    Args:
        store: the server's artifact store.
        root: the folder below which requests may name paths; None: they may name none.
        of_jobs: the names that jobs have published, or will, each with the job's.
    """

    def __init__(
        self, registry: AdapterRegistry, store: Path, root: Path | None, of_jobs: Callable[[], Mapping[str, str]]
    ) -> None:
        self._registry = registry
        self._store = store
        self._root = root
        self._of_jobs = of_jobs
        self._records: dict[str, AdapterRecord] = {}
        self._numbers: dict[str, int] = {}
        self._lock = asyncio.Lock()

    @property
    def names(self) -> frozenset[str]:
        """No job may publish under these."""
        return frozenset(self._records)

    async def start(self, named: Mapping[str, Path]) -> None:
        """Load those that were named at the start, once the model is there; forget those of the start before.

        Raises:
            StartError: one cannot be loaded; the message names it.
        """
        await asyncio.to_thread(shutil.rmtree, self._store / FOLDER, ignore_errors=True)
        for name, path in named.items():
            try:
                await self._load(name, path.expanduser().absolute(), again=False)
            except ApiError as error:
                raise StartError(f"adapter {name} of {path}: {error.message}") from None

    async def load(self, name: str, path: str, *, again: bool) -> int:
        """Serve the folder `path` as `name`; `again`: in the place of what has that name. Returns the version's number.

        Raises:
            ApiError: 400 that names the field and the remedy, 403 for a path that may not be read, 409 for a name that
                is taken.
        """
        return await self._load(name, self._allowed(path), again=again)

    def unload(self, name: str) -> None:
        """Serve it no more. ApiError 404 where nothing of that name was loaded."""
        if name not in self._records:
            job = self._of_jobs().get(name)
            if job is not None:
                message = f"lora_name is {name!r}, which job {job} publishes: delete that job, or leave it"
                raise ApiError(409, message, param="lora_name", code="published_by_a_job")
            message = f"lora_name is {name!r}, and no adapter of that name was loaded"
            raise ApiError(404, message, param="lora_name", code="model_not_found")
        record = self._records.pop(name)
        self._registry.discard(name)
        self._remove(record)

    def _allowed(self, path: str) -> Path:
        if self._root is None:
            message = "this server loads no adapters by request: start it with --adapter-dir, the folder they lie below"
            raise ApiError(403, message, param="lora_path", code="not_allowed")
        try:
            root = self._root.resolve(strict=True)
            found = (root / path).resolve(strict=True)
            if found.is_relative_to(root):
                return found
        except (OSError, ValueError, RuntimeError):
            pass  # told as one that leads out: nobody learns what there is elsewhere
        message = f"lora_path is {path[:200]!r}: there is no such folder below this server's --adapter-dir"
        raise bad_request(message, "lora_path", INVALID)

    async def _load(self, name: str, folder: Path, *, again: bool) -> int:
        self._check_name(name, again=again)
        async with self._lock:
            self._check_name(name, again=again)
            record = await self._copied(name, folder)
            try:
                await self._registry.add(record)
            except (CheckpointError, AdapterLoadError, EngineGoneError, OSError) as error:
                self._remove(record)
                why = str(error).replace(str(self._store / record.path), str(folder))
                raise bad_request(f"lora_path: {why}", "lora_path", "invalid_adapter") from None
            before = self._records.get(name)
            self._records[name], self._numbers[name] = record, record.number
        if before is not None:
            self._remove(before)
        return record.number

    def _check_name(self, name: str, *, again: bool) -> None:
        try:
            _NAME.validate_python(name)
        except ValidationError as error:
            why = str(error.errors(include_url=False)[0]["msg"])
            raise bad_request(f"lora_name is {name[:80]!r}: {why}", "lora_name", INVALID) from None
        if name in {one.name for one in self._registry.listing() if one.version is None}:
            raise bad_request(f"lora_name is {name!r}, the base model's name: choose another", "lora_name", INVALID)
        job = self._of_jobs().get(name)
        if job is not None:
            message = f"lora_name is {name!r}, under which job {job} publishes: choose another"
            raise ApiError(409, message, param="lora_name", code="name_taken")
        if name in self._records and not again:
            message = f"lora_name is {name!r}, which is loaded already: set load_inplace to true, or unload it first"
            raise bad_request(message, "lora_name", "already_loaded")
        if name not in self._records and len(self._records) >= MOST:
            raise ApiError(409, f"{MOST} adapters are loaded: unload some", code="too_many_adapters")

    async def _copied(self, name: str, folder: Path) -> AdapterRecord:
        """A copy in the store, which nobody changes; the engine judges what it holds."""
        path = f"{FOLDER}/{uuid.uuid4().hex}"
        copy = self._store / path
        try:
            rank = (await asyncio.to_thread(read_adapter_config, folder)).rank
            digest = await asyncio.to_thread(_copy, folder, copy)
        except (AdapterFolderError, OSError) as error:
            await asyncio.to_thread(shutil.rmtree, copy, ignore_errors=True)
            raise bad_request(f"lora_path: {error}", "lora_path", "invalid_adapter") from None
        number = self._numbers.get(name, 0) + 1
        return AdapterRecord(name=name, number=number, path=path, sha256=digest, job_uid=copy.name, rank=rank)

    def _remove(self, record: AdapterRecord) -> None:
        shutil.rmtree(self._store / record.path, ignore_errors=True)


def _copy(folder: Path, copy: Path) -> str:
    """Copy what an adapter is made of; returns the digest of the copy's manifest. OSError names the file."""
    copy.mkdir(parents=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, variables.FILE):
        try:
            with opened(folder, name) as source, (copy / name).open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except FileNotFoundError:
            if name == ADAPTER_CONFIG:
                raise
    return seal_folder(copy)
