"""As much of Cloud Storage's JSON API as its clients need here, in memory: gcsfs, TensorStore, ArrayRecord, Orbax.

As in a real store there are no directories, and names are taken as they are.
"""

import collections
import http.server
import json
import re
import sys
import threading
import urllib.parse


class Server(http.server.ThreadingHTTPServer):
    """Listens on a free port of this machine from `start` on.

    Attributes:
      objects: (bucket, name) -> (content, generation).
      uploads: what has come of large objects, by number.
      requests: (method, name of the object or "" for a list) -> how many there were.
      address: "http://…"
      broken: name of an object whose next upload fails once after its first part, or "".
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[tuple[str, str], tuple[bytes, int]] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: collections.Counter[tuple[str, str]] = collections.Counter()
        self.generation, self.broken = 0, ""
        self.lock = threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def start(self) -> "Server":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def handle_error(self, request, client_address):
        """A client that has given up, which a busy machine makes it do, will ask again; all else is told."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def put(self, key: tuple[str, str], content: bytes) -> None:
        self.generation += 1
        self.objects[key] = content, self.generation


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def setup(self):
        super().setup()
        self.store: Server = self.server

    def _answer(self, code: int, content: bytes | dict = b"", **headers: object) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        self.send_response(code)
        for name, value in {"Content-Length": len(body), "Content-Type": kind, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def _asked(self, content: bytes = b"") -> tuple[list[str], dict[str, str], bytes]:
        """The path behind `b/` in its parts, the parameters and what came with the request, which is counted."""
        url = urllib.parse.urlsplit(self.path)
        where = re.fullmatch(r"(?:/upload|/download)?(?:/storage/v1)?/b/(.*)", url.path)
        parts = [urllib.parse.unquote(part) for part in where[1].split("/")] if where else []
        parameters = dict(urllib.parse.parse_qsl(url.query))
        name = parameters.get("name") or (parts[2] if len(parts) > 2 else "")
        with self.store.lock:
            self.store.requests[self.command, name] += 1
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return parts, parameters, content

    def _about(self, key: tuple[str, str]) -> dict:
        content, generation = self.store.objects[key]
        bucket, name = key
        link = f"{self.store.address}/download/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}?alt=media"
        about = {"kind": "storage#object", "bucket": bucket, "name": name, "size": str(len(content))}
        return about | {"generation": str(generation), "metageneration": "1", "mediaLink": link}

    def do_GET(self):
        parts, parameters, _ = self._asked()
        with self.store.lock:
            answer, headers = self._get(parts, parameters)
        self._answer(*answer, **headers)

    def _get(self, parts: list[str], parameters: dict[str, str]) -> tuple[tuple, dict]:
        if len(parts) == 1:
            return (200, {"kind": "storage#bucket", "name": parts[0]}), {}
        if len(parts) == 2:
            return (200, self._list(parts[0], parameters)), {}
        if len(parts) != 3 or (parts[0], parts[2]) not in self.store.objects:
            return _missing("/".join(parts)), {}
        key = parts[0], parts[2]
        if parameters.get("alt") != "media":
            return (200, self._about(key)), {}
        content, generation = self.store.objects[key]
        headers = {"x_goog_generation": generation, "x_goog_stored_content_length": len(content)}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return (200, content), headers
        start = int(span[1]) if span[1] else max(0, len(content) - int(span[2]))  # "-5": the last five bytes
        stop = min(int(span[2]) + 1 if span[1] and span[2] else len(content), len(content))
        if start >= stop:
            return (416,), {}
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return (206, content[start:stop]), headers

    def _list(self, bucket: str, parameters: dict[str, str]) -> dict:
        prefix, delimiter = parameters.get("prefix", ""), parameters.get("delimiter", "")
        low, high = parameters.get("startOffset", ""), parameters.get("endOffset", "\U0010ffff")
        items, prefixes = [], set()
        for key in sorted(key for key in self.store.objects if key[0] == bucket and key[1].startswith(prefix)):
            inside, more, _ = key[1].removeprefix(prefix).partition(delimiter or "\0")
            if more:
                prefixes.add(prefix + inside + delimiter)
            elif low <= key[1] < high:
                items.append(self._about(key))
        start, most = int(parameters.get("pageToken", 0)), int(parameters.get("maxResults", 1000))
        page = {"nextPageToken": str(start + most)} if len(items) > start + most else {}
        items = items[start : start + most]
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes), **page}

    def do_POST(self):
        parts, parameters, content = self._asked()
        with self.store.lock:
            answer, headers = self._post(parts, parameters, content)
        self._answer(*answer, **headers)

    do_PUT = do_POST

    def _post(self, parts: list[str], parameters: dict[str, str], content: bytes) -> tuple[tuple, dict]:
        if len(parts) > 3:  # b/BUCKET/o/NAME/moveTo/o/NAME, b/BUCKET/o/NAME/rewriteTo/b/BUCKET/o/NAME
            bucket, _, name, verb, *place = parts
            source, target = (bucket, name), (bucket if verb == "moveTo" else place[1], place[-1])
            if source not in self.store.objects:
                return _missing(name), {}
            self.store.put(target, self.store.objects[source][0])
            if verb == "moveTo":
                del self.store.objects[source]
            return (200, {"done": True, "resource": self._about(target)} | self._about(target)), {}
        if "upload_id" in parameters:
            return self._go_on((parts[0], parameters["name"]), parameters["upload_id"], content)
        if parameters.get("uploadType") == "resumable":
            name = parameters.get("name") or json.loads(content)["name"]
            number = f"{len(self.store.uploads)}"
            self.store.uploads[number] = b""
            query = urllib.parse.urlencode({"name": name, "upload_id": number})
            return (200, {}), {"Location": f"{self.store.address}/upload/storage/v1/b/{parts[0]}/o?{query}"}
        if parameters.get("uploadType") == "multipart":
            mark = re.search(r"boundary=[\"']?([^\"']+)", self.headers["Content-Type"])[1].encode()
            about, rest = content.split(b"--" + mark, 2)[1:]
            name = json.loads(about.split(b"\n\n", 1)[1])["name"]
            content = rest.split(b"\n\n", 1)[1].rsplit(b"\n--" + mark, 1)[0]
        else:
            name = parameters["name"]
        wanted = parameters.get("ifGenerationMatch")
        if wanted is not None and int(wanted) != self.store.objects.get((parts[0], name), (b"", 0))[1]:
            return (412,), {}
        self.store.put((parts[0], name), content)
        return (200, self._about((parts[0], name))), {}

    def _go_on(self, key: tuple[str, str], number: str, content: bytes) -> tuple[tuple, dict]:
        """Takes a part of a large object, perhaps again; the last one says how long the object is."""
        span, _, whole = self.headers.get("Content-Range", "").removeprefix("bytes ").rpartition("/")
        before = self.store.uploads[number]
        if key[1] == self.store.broken and before:
            self.store.broken = ""
            return (400, {"error": {"code": 400, "message": "broken"}}), {}
        start = int(span.partition("-")[0]) if span not in ("", "*") else len(before)
        self.store.uploads[number] = before[:start] + content
        if whole == "*" or whole and len(self.store.uploads[number]) < int(whole):
            return (308,), {"Range": f"bytes=0-{len(self.store.uploads[number]) - 1}"}
        self.store.put(key, self.store.uploads[number])
        return (200, self._about(key)), {}

    def do_DELETE(self):
        parts, parameters, _ = self._asked()
        if "upload_id" in parameters:
            return self._answer(499)  # as the real one says that an upload is given up
        with self.store.lock:
            found = self.store.objects.pop((parts[0], parts[2]), None)
        self._answer(*(_missing(parts[2]) if found is None else (204,)))


def _missing(name: str) -> tuple[int, dict]:
    return 404, {"error": {"code": 404, "message": f"No such object: {name}"}}
