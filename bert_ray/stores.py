"""Object stores by their URIs (`s3://bucket/folder`)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from bert_ray.errors import JobError

if TYPE_CHECKING:
    from pyarrow import fs

# Names of what Arrow takes in a URI's query and nobody else may read: client_secret, the signature of an Azure SAS, …
_SECRET = re.compile("secret|token|password|access_key|^sig$", re.IGNORECASE)


def open_store(uri: str) -> tuple[fs.FileSystem, str]:
    """The store of a URI, and the place in it.

    Raises:
        JobError: it is no URI, or a secret stands in it. What is read and written is noted in receipts, reports, cards
            of bundles and messages, where a secret would stand too.
        pa.ArrowInvalid, OSError: Arrow knows no such store, or it does not answer.
    """
    from pyarrow import fs

    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise JobError(f"{uri} is no address of a store that is known: {error}") from error
    if parts.password is not None or any(_SECRET.search(name) for name, _ in parse_qsl(parts.query)):
        shown = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
        raise JobError(
            f"the address of {shown} holds a secret, which receipts and reports would show: leave it out, and give it "
            "in the environment, on every worker (for s3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
    return fs.FileSystem.from_uri(uri)
