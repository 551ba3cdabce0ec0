"""Where published bytes are: a URL as a recipe writes it, to a local file or to the address that a server answers at.

https://host/path, http://host/path
file:/path, or a plain path                  relative to the current directory
modelscope://owner/name/path[@revision]      a file of a ModelScope dataset
hf://datasets/owner/name/path[@revision]     a file of a Hugging Face dataset; without ``datasets/``, of a model
"""

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

ENDPOINTS = {"modelscope": "https://www.modelscope.cn", "huggingface": "https://huggingface.co"}

FORMS = "https://..., file:..., a path, modelscope://owner/name/path[@revision] or hf://datasets/owner/name/path[@revision]"

# What opens an address by itself: of S3, Google, Azure, CloudFront, and the usual names of tokens.
SIGNATURES = frozenset(
    ("x-amz-signature", "x-amz-security-token", "x-goog-signature", "signature", "sig", "token", "access_token", "api_key",
     "apikey", "password")
)  # fmt: skip

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_HUB_FILE = re.compile(r"(?P<owner>[^/@]+)/(?P<name>[^/@]+)/(?P<path>[^@]+?)(?:@(?P<revision>[^@]+))?")


def check_url(url: str) -> str:
    """Return ``url`` as it stands. Raises ValueError where no source can be read from it."""
    resolve(url, {})
    return url


def resolve(url: str, endpoints: Mapping[str, str]) -> Path | str:
    """A local file's path, or the http address of the bytes; ``endpoints`` says where the hubs answer.

    Raises ValueError for a scheme that is not known and for a hub's file without owner, name or path.
    """
    scheme = match[1].lower() if (match := _SCHEME.match(url)) else None
    if scheme in ("http", "https"):
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            # Not repeated: it would stand in the log, and from the recipe in every manifest.
            raise ValueError(f"an account in the address of {parts.hostname}; leave it out and put a token into SEQMILL_TOKENS")
        if signed := sorted({name.lower() for name, _ in parse_qsl(parts.query)} & SIGNATURES):
            raise ValueError(
                f"a signed address of {parts.hostname} ({signed[0]}=...), which would stand in manifests and opens the file to "
                "whoever reads it; put a token into SEQMILL_TOKENS, or fetch the file by hand and name its path"
            )
        if not parts.hostname:
            raise ValueError(f"{url}: no host in it; write {FORMS}")
        return url
    if scheme == "modelscope":
        return _modelscope(url, _endpoint("modelscope", endpoints))
    if scheme == "hf":
        return _huggingface(url, _endpoint("huggingface", endpoints))
    if scheme not in (None, "file"):
        raise ValueError(f"{url}: unknown scheme {scheme}; write {FORMS}")
    return _local(url, scheme)


def _endpoint(hub: str, endpoints: Mapping[str, str]) -> str:
    return endpoints.get(hub, ENDPOINTS[hub]).rstrip("/")


def _local(url: str, scheme: str | None) -> Path:
    path = url if scheme is None else unquote(urlsplit(url).path)
    if not path or (scheme and urlsplit(url).netloc not in ("", "localhost")):
        raise ValueError(f"{url!r}: not the path of a file here; write file:/path, file:path or a plain path")
    return Path(path).expanduser().absolute()


def _modelscope(url: str, endpoint: str) -> str:
    # The address that ModelScope's own client asks (modelscope.hub.api.HubApi.get_dataset_file_url); it answers with the
    # file, or with a redirect to the store that holds it.
    file = _hub_file(url, url.partition("://")[2])
    query = urlencode({"Source": "SDK", "Revision": file["revision"] or "master", "FilePath": file["path"]})
    return f"{endpoint}/api/v1/datasets/{quote(file['owner'])}/{quote(file['name'])}/repo?{query}"


def _huggingface(url: str, endpoint: str) -> str:
    rest = url.partition("://")[2]
    file = _hub_file(url, rest.removeprefix("datasets/"))
    folder = "datasets/" if rest.startswith("datasets/") else ""
    revision = quote(file["revision"] or "main", safe="")  # refs/pr/1 is one segment of the address
    return f"{endpoint}/{folder}{quote(file['owner'])}/{quote(file['name'])}/resolve/{revision}/{quote(file['path'])}"


def _hub_file(url: str, rest: str) -> dict[str, str]:
    match = _HUB_FILE.fullmatch(rest)
    if not match:
        raise ValueError(f"{url}: no owner/name/path in it; write {FORMS}")
    return {name: value or "" for name, value in match.groupdict().items()}
