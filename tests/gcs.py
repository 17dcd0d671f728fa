"""A Google Cloud Storage bucket on loopback, with faults on demand.

gcp-storage-emulator answers the requests, in this process and in memory. Added
to it is what it lacks: conditional writes, moves, ranges of a listing, uploads
that go on after a lost answer, and keep-alive. Each answer is one step under
one lock, so of two creators of an object exactly one wins.

  with gcs.Bucket() as bucket:
    run_main(f"--workdir={bucket.url}/run", environment=bucket.environment)
    bucket.inject(503, seconds=5)  # Every request, for five seconds.
    bucket.inject(gcs.RESET, gcs.writes("run/checkpoints/"), times=3)
    bucket.inject(bucket.stop, gcs.writes("run/checkpoints/2"), times=1)
"""

import http.server
import importlib.util
import io
import json
import logging
import math
import re
import socket
import struct
import sys
import threading
import time
from urllib import parse

PACKAGES = ("gcp_storage_emulator", "gcsfs")
MISSING = ""  # Why tests of a bucket must be skipped.
if not all(map(importlib.util.find_spec, PACKAGES)):
  MISSING = "NO CLOUD STORAGE: pip install gcp-storage-emulator gcsfs"

RESET = "reset"  # Resets the connection instead of doing what it asks for.
LOSE = "lose"  # Does it, then resets the connection: the answer is lost.

ERRORS = {
  403: ("forbidden", "Permission denied on resource (or it may not exist)."),
  412: ("conditionNotMet", "A pre-condition that you specified did not hold."),
  429: ("rateLimitExceeded", "The object exceeded the rate limit."),
  503: ("backendError", "We encountered an internal error. Try again."),
}


def writes(prefix=""):
  """A regular expression: requests that change objects below a prefix."""
  return rf"(POST|PUT|PATCH|DELETE) \S*/o/{re.escape(prefix)}"


class Fault:
  """See Bucket.inject. `with` ends it; `hits` counts the requests it befell."""

  def __init__(self, action, match, times, seconds):
    self.action, self.match, self.times = action, match, times
    self.until, self.hits = time.monotonic() + seconds, 0

  def takes(self, request):
    left = self.hits < self.times and time.monotonic() < self.until
    hit = left and re.search(self.match, request) is not None
    self.hits += hit
    return hit

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    self.times = 0


class Bucket:
  """The bucket gs://runs, empty at first.

  `requests` lists the requests so far as 'POST /upload/.../o/folder/file?...':
  names are unquoted, and an upload's name is in its path wherever it was sent.
  A request takes `delay` seconds, and all share `bandwidth`, in bytes a second.
  """

  url = "gs://runs"

  def __init__(self):
    self.requests, self.faults = [], []
    self.delay, self.bandwidth = 0.0, math.inf
    self.down = False
    self.uploads = {}  # Resumable ones: [name, generation wanted, answer].
    self.lock, self.link = threading.Lock(), threading.Lock()
    self.storage = _storage()

  def __enter__(self):
    self.server = _Server(("127.0.0.1", 0), _Handler)
    self.server.bucket = self
    self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
    self.environment = {
      "STORAGE_EMULATOR_HOST": self.endpoint,
      "TENSORSTORE_GCS_HTTP_URL": self.endpoint,
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
      "GCE_METADATA_ROOT": "127.0.0.1:1",
      "EPATH_USE_TF": "false",
    }
    self.thread = threading.Thread(
      target=self.server.serve_forever, args=(0.05,), daemon=True
    )
    self.thread.start()
    return self

  def __exit__(self, *exception):
    self.stop()
    self.server.shutdown()
    self.thread.join()
    self.server.server_close()

  def inject(self, action, match="", times=math.inf, seconds=math.inf):
    """Lets something happen to the next requests that `match`, a regex.

    `action` is an HTTP status, RESET, LOSE, or a function to call before the
    request is served, such as `stop`. Of several faults the first one counts.
    """
    self.faults.append(Fault(action, match, times, seconds))
    return self.faults[-1]

  def stop(self):
    """Resets every connection that is used from now on; the objects stay."""
    with self.lock:
      self.down = True

  def start(self):
    self.down = False

  def names(self, prefix=""):
    names = list(self.storage.objects.get("runs", {}))
    return sorted(x for x in names if x.startswith(prefix))

  def read(self, name) -> bytes:
    return self.storage.get_file("runs", name)

  def transfer(self, size):
    with self.link:
      time.sleep(size / self.bandwidth)


def _storage():
  from gcp_storage_emulator.handlers import buckets
  from gcp_storage_emulator.storage import Storage

  class Memory(Storage):
    start, end = "", ""  # The names that a listing is limited to.

    def _list_live_candidates(self, *args):
      found = super()._list_live_candidates(*args)
      end = self.end or chr(sys.maxunicode)
      return [x for x in found if self.start <= x[0] < end]

    def add_to_resumable_upload(
      self, file_id, content, total_size, expected_start
    ):
      """Skips the bytes that it has already."""
      known = self.get_resumable_byte_count(file_id) - expected_start
      known = min(max(known, 0), len(content))
      return super().add_to_resumable_upload(
        file_id, content[known:], total_size, expected_start + known
      )

    def _write_config_to_file(self):
      """Nothing, instead of a list of all objects at each write."""

  logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
  storage = Memory(use_memory_fs=True)
  buckets.create_bucket("runs", storage)
  storage.buckets["runs"]["softDeletePolicy"] = {"retentionDurationSeconds": 0}
  return storage


class _Server(http.server.ThreadingHTTPServer):
  request_queue_size = 128

  def handle_error(self, request, client_address):
    if not isinstance(sys.exception(), OSError):  # The client has gone.
      super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"

  def do_POST(self):
    bucket, body = self.server.bucket, self._body()
    request = self._describe(body)
    bucket.requests.append(request)
    time.sleep(bucket.delay)
    bucket.transfer(len(body))
    with bucket.lock:
      taken = (x.action for x in bucket.faults if x.takes(request))
      action = next(taken, None)
    if callable(action):
      action()
    with bucket.lock:
      if bucket.down or action == RESET:
        return self._reset()
      if isinstance(action, int):
        answer = self._error(action)
      else:
        answer = self._serve(bucket, body)
    if action == LOSE:
      return self._reset()
    bucket.transfer(len(answer))
    self.wfile.write(answer)

  do_GET = do_PUT = do_PATCH = do_DELETE = do_POST

  def _body(self):
    if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    body = b""
    while size := int(self.rfile.readline().split(b";")[0], 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    while self.rfile.readline().strip():
      pass
    return body

  def _describe(self, body):
    """Finds the object's name; returns the line for `Bucket.requests`."""
    url = parse.urlsplit(self.path)
    self.query = dict(parse.parse_qsl(url.query))
    self.upload = self.server.bucket.uploads.get(self.query.get("upload_id"))
    self.name = parse.unquote(url.path.rpartition("/o/")[2])
    path = parse.unquote(url.path)
    if path.startswith("/upload/"):
      if self.upload:
        self.name = self.upload[0]
      elif "name" in self.query:
        self.name = self.query["name"]
      elif b"{" in body:  # The metadata, before the content.
        text = body[body.index(b"{") :][: 1 << 16].decode(errors="replace")
        self.name = json.JSONDecoder().raw_decode(text)[0].get("name")
      path += f"/{self.name}"
    return f"{self.command} {path}?{parse.unquote(url.query)}".rstrip("?")

  def _serve(self, bucket, body):
    """The emulator's answer, with what the emulator lacks."""
    from gcp_storage_emulator.server import Router

    storage, query, upload = bucket.storage, self.query, self.upload
    found = storage.objects.get("runs", {}).get(self.name, {})
    current = found.get("generation", "0")
    if upload and self.command == "DELETE":
      bucket.uploads.pop(query["upload_id"])
      return self._error(499)  # The answer to a cancelled upload.
    if upload and upload[2]:
      return upload[2]
    wanted = upload[1] if upload else query.get("ifGenerationMatch")
    if self.command != "GET" and wanted not in (None, current):
      return self._error(412)
    if query.get("uploadType") == "multipart" and b"\r\n" not in body[:80]:
      # The emulator would take a last \r of the content for the line's end.
      body = b"\r\n--".join(body.rsplit(b"\n--", 1))
    move = re.fullmatch(r"(.*/b/([^/]+)/o/([^/]+))/moveTo(/o/.+)", self.path)
    if move:
      self.path = f"{move[1]}/rewriteTo/b/{move[2]}{move[4]}"
    storage.start = query.get("startOffset", "")
    storage.end = query.get("endOffset", "")
    del self.headers["Transfer-Encoding"], self.headers["Content-Length"]
    self.headers["Content-Length"] = str(len(body))
    files, self.storage = (self.rfile, self.wfile), storage
    self.rfile, self.wfile = io.BytesIO(body), io.BytesIO()
    try:
      Router(self).handle(self.command)
      answer = self.wfile.getvalue()
    finally:
      self.rfile, self.wfile = files
    head, end, content = answer.partition(b"\r\n\r\n")
    done = head.startswith(b"HTTP/1.1 200")
    if found and self.command == "GET":
      head += b"\r\nx-goog-generation: " + current.encode()
      return head + end + content
    if move and done:
      storage.delete_file("runs", parse.unquote(move[3]))
      return self._json(200, json.loads(content)["resource"])
    if upload and done:
      upload[2] = answer
    if started := re.search(rb"\nLocation: \S*[?&]upload_id=(\S+)", head):
      key = parse.unquote_plus(started[1].decode())
      bucket.uploads[key] = [self.name, wanted, None]
    return answer

  def _error(self, status):
    reason, message = ERRORS.get(status, ("error", f"Status {status}."))
    error = {"message": message, "domain": "global", "reason": reason}
    error = {"code": status, "message": message, "errors": [error]}
    return self._json(status, {"error": error})

  def _json(self, status, value):
    content = json.dumps(value)
    head = f"HTTP/1.1 {status} -\r\nContent-Type: application/json"
    head += f"\r\nContent-Length: {len(content)}"
    return f"{head}\r\n\r\n{content}".encode()

  def _reset(self):
    self.close_connection = True
    linger = struct.pack("ii", 1, 0)
    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    self.rfile.close()
    self.connection.close()

  def log_message(self, *args):
    """Nothing: `Bucket.requests` has them."""
