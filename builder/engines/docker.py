"""The docker engine: a plan's Dockerfile through BuildKit, containers to try images in; docker-py lives here only."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any, ParamSpec, TypeVar

import docker
import docker.auth
import docker.errors
import requests
from docker.models.containers import Container
from docker.types import DeviceRequest, LogConfig
from docker.utils.socket import frames_iter

from builder.base import BaseImage
from builder.engines import BOX, MOST_PRINTED, Allowance, BuiltImage, End, Ended, Found, RunResult, Steps
from builder.errors import CellFailedError, DiskError, EngineError, ImpossibleError
from builder.render import VALIDATOR, Plan
from builder.store import Store

MIN_VERSION = 25
"""The first Docker Engine whose images can live in containerd's store, where an image's id is its manifest's digest."""
UNPROVEN = "torchyard-unproven"
"""Repository of the names that images bear in the engine between build and proof."""
PROOF_LABEL = "torchyard.proof"
"""Label of the containers that images are tried in; its value is the image's digest."""
LAST_LINES = 25
CONFINED_LABEL = "torchyard.validate"
"""Label of the containers that images are validated in; its value is the image's digest."""
TMP_BYTES = 4 << 30
"""What /tmp of a watched container may hold: it is memory of the engine's machine."""
NOT_STARTED = (126, 127)
"""Exit codes by which a container's init, as any shell, says that there is no such program or that it may not run."""
PROBE_S = 20
"""How long an engine may take to say that it is there."""
WORK_S = 600
"""How long one of its answers may take: removing 12 GB on a busy disk takes minutes."""
REMEDIES = (
    "start the engine of this machine: systemctl start docker, or Docker Desktop",
    "name another one: export DOCKER_HOST=unix:///path/to/docker.sock (or tcp://host:port)",
    'on Debian as root, let torchyard\'s script make one: eval "$(.ci/engine-up)"',
)


@dataclass
class _Vertex:
    name: str = ""
    error: str = ""
    started: bool = False
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    rest: str = ""


class BuildkitLog:
    """Follows BuildKit's machine-readable progress: steps as they begin, and what a failing step printed."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._vertexes: dict[str, _Vertex] = {}
        self.trailer: list[str] = []
        """Lines that are not progress: the client's own error message at the end."""

    def feed(self, line: str) -> None:
        """Take one line of the client's standard error."""
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            if line.strip():
                self.trailer.append(line.rstrip())
            return
        for item in event.get("vertexes") or ():
            vertex = self._vertexes.setdefault(item["digest"], _Vertex())
            vertex.name = item.get("name", vertex.name)
            vertex.error = item.get("error", vertex.error)
            if item.get("started") and not vertex.started:
                vertex.started = True
                if not vertex.name.startswith("[internal]"):
                    self._steps.step(_short_step(vertex.name))
        for item in event.get("logs") or ():
            vertex = self._vertexes.setdefault(item["vertex"], _Vertex())
            # Chunks do not end with lines.
            text = vertex.rest + base64.b64decode(item.get("data") or "").decode("utf-8", "replace")
            *lines, vertex.rest = re.split(r"\r?\n", text)
            for out in lines:
                vertex.lines.append(out)
                self._steps.output(out)

    @property
    def failure(self) -> tuple[str, str, list[str]] | None:
        """The failing step, its error, and its last lines; None if no step failed."""
        for vertex in self._vertexes.values():
            if vertex.error and "context canceled" not in vertex.error:
                lines = [*vertex.lines, *([vertex.rest] if vertex.rest else [])]
                code = re.search(r"exit code: \d+$", vertex.error)
                return _short_step(vertex.name), code.group() if code else vertex.error, lines[-LAST_LINES:]
        return None


def _short_step(name: str) -> str:
    """Return a step's name in one line of reasonable length."""
    text = " ".join(name.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


P = ParamSpec("P")
R = TypeVar("R")


def _translated(method: Callable[P, R]) -> Callable[P, R]:
    """Make every failure that docker-py reports an EngineError: its own are OSErrors, and would end a whole run."""

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except (docker.errors.DockerException, requests.RequestException, tarfile.TarError) as error:
            raise EngineError(
                "the container engine broke off", why=_innermost(error), tries=("run the same command again",)
            ) from error

    return wrapper


def whole_name(tag: str) -> str:
    """Return a name as engines keep it: with the default registry where it names none.

    Docker 28 lists an image that was loaded by another name, but can neither run nor remove it by that.
    """
    registry, path = docker.auth.resolve_repository_name(tag)
    if registry == docker.auth.INDEX_NAME and "/" not in path:
        path = f"library/{path}"
    return f"{registry}/{path}"


class DockerEngine:
    """A Docker-compatible engine, reached as the user's environment says (DOCKER_HOST or the default socket)."""

    name = "docker"

    @cached_property
    def client(self) -> docker.DockerClient:
        """A client of an engine that can do what is needed; raises EngineError saying what is missing."""
        try:
            docker.from_env(timeout=PROBE_S).version()
            client = docker.from_env(timeout=WORK_S)
            version = client.version()
        except (docker.errors.DockerException, requests.RequestException) as error:
            where = os.environ.get("DOCKER_HOST", "the default socket (DOCKER_HOST is not set)")
            raise EngineError(
                "no container engine answers", where=where, why=_innermost(error), tries=REMEDIES
            ) from error
        found = str(version.get("Version", ""))
        number = re.match(r"\d+", found)
        if number and int(number.group()) < MIN_VERSION:
            raise EngineError(
                f"Docker Engine {found} is too old", why=f"at least version {MIN_VERSION} is needed", tries=REMEDIES
            )
        return client

    @cached_property
    def _docker(self) -> str:
        """Path of the docker client with buildx; BuildKit cannot be driven through the engine's own interface."""
        program = shutil.which("docker")
        if program is None:
            raise EngineError(
                "the docker client is not installed", why="BuildKit is driven through it", tries=REMEDIES[2:]
            )
        done = subprocess.run([program, "buildx", "version"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise EngineError(
                "the docker client lacks buildx",
                why=(done.stderr.strip().splitlines() or ["`docker buildx version` failed"])[0],
                tries=("install the package docker-buildx or docker-buildx-plugin", *REMEDIES[2:]),
            )
        return program

    @_translated
    def check(self) -> None:
        """Raise EngineError if images cannot be built here."""
        info = self.client.info()
        _ = self._docker
        driver = dict(info.get("DriverStatus") or ()).get("driver-type", "")
        if "containerd" not in driver:
            raise EngineError(
                "the engine keeps images in its classic store",
                why="there an image's manifest, and with it its digest, does not survive a build",
                tries=(
                    'put {"features": {"containerd-snapshotter": true}} into daemon.json and restart the engine',
                    *REMEDIES[1:],
                ),
            )

    @property
    def disk(self) -> Path | None:
        """Directory on the file system that the engine fills, None if it is not on this machine."""
        if self.client.api.base_url != "http+docker://localhost":  # docker-py's name for a local socket
            return None
        root = Path(self.client.info().get("DockerRootDir") or "/")
        # Only root may look into it; its file system is what counts, and a parent tells that as well.
        for directory in (root, *root.parents):
            with contextlib.suppress(OSError):
                shutil.disk_usage(directory)
                return directory
        return None

    # ------------------------------------------------------------------ Builder

    @_translated
    def build(self, plan: Plan, base: BaseImage | None, *, store: Store, steps: Steps) -> BuiltImage:
        """Build the plan's Dockerfile hermetically: no network in any step, wheels and base from the store."""
        name = self.unproven_name(plan.cell.id)
        with contextlib.suppress(docker.errors.ImageNotFound):
            self.client.images.remove(name)  # a run that was killed before its proof left it
        with store.scratch(f"docker-{plan.cell.id}") as work:
            context, wheels, metadata = work / "context", work / "wheels", work / "metadata.json"
            context.mkdir()
            for filename, content in plan.files.items():
                path = context / filename
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                # BuildKit takes over modes: they must not depend on the umask.
                path.chmod(0o644)
            store.link(wheels, {wheel.filename: wheel.sha256 for wheel in plan.lock.wheels})
            (wheels / VALIDATOR).write_bytes(plan.validator)
            command = [
                self._docker, "buildx", "build", "--builder", "default", "--progress", "rawjson",
                # Never from BuildKit's cache: what an earlier build left there was not checked by this one.
                "--platform", plan.cell.platform, "--network", "none", "--no-cache",
                "--provenance", "false", "--sbom", "false",
                "--build-arg", "PIP_NO_INDEX=1", "--build-arg", f"SOURCE_DATE_EPOCH={plan.epoch}",
                "--build-context", f"wheels={wheels}",
                "--metadata-file", str(metadata),
                # Times are set inside the step, so the exporter need not rewrite layers (which compresses them twice,
                # and the base's anew), and the image appears in the engine without a detour through an archive.
                "--output", f"type=image,name={name},oci-mediatypes=true,compression=gzip,compression-level=6",
                "--file", str(context / "Dockerfile"), str(context),
            ]  # fmt: skip
            if base is not None:
                command += ["--build-context", f"base=oci-layout://{base.layout}@{base.digest}"]
            log = BuildkitLog(steps)
            code = _follow(command, log, {**os.environ, "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"})
            if code != 0:
                raise _build_error(plan, log)
            digest = json.loads(metadata.read_text("utf-8")).get("containerimage.digest")
            if not digest:
                raise EngineError(f"{plan.cell.id}: BuildKit did not say which image it made", tries=REMEDIES[1:])
        image = self.client.images.get(digest)
        return BuiltImage(digest=digest, size_bytes=int(image.attrs["Size"]))

    # ------------------------------------------------------------------ Runner

    def unproven_name(self, cell_id: str) -> str:
        """Return the name of a cell's image between build or load and proof."""
        return f"{UNPROVEN}:{cell_id}"

    @_translated
    def run(
        self, digest: str, argv: Sequence[str], *, files: Mapping[str, bytes], collect: Sequence[str], timeout_s: float
    ) -> RunResult:
        """Run `argv` in place of the image's own command, under its own user and init.

        Files travel as archives, not as mounts, so the engine may be on another machine.
        """
        # A run that was killed before its end left its container, and that would keep the image for ever.
        for stale in self.client.containers.list(all=True, filters={"label": f"{PROOF_LABEL}={digest}"}):
            stale.remove(force=True, v=True)
        container = self.client.containers.create(
            digest,
            labels={PROOF_LABEL: digest},
            command=list(argv),
            network_mode="none",
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            pids_limit=4096,
        )
        try:
            for directory, members in _by_directory(files).items():
                container.put_archive(directory, _archive(members))
            container.start()
            try:
                code = int(container.wait(timeout=timeout_s)["StatusCode"])
            except requests.RequestException:  # docker-py reports its deadline as a broken connection
                container.kill()
                container.wait(timeout=60)
                code = 124
            log = container.logs(tail=200).decode("utf-8", "replace")
            return RunResult(exit_code=code, files=dict(_collect(container, collect)), log=log)
        finally:
            with contextlib.suppress(docker.errors.APIError, requests.RequestException):
                container.remove(force=True, v=True)

    @_translated
    def find(self, reference: str) -> Found:
        """Return the image a reference means, pulled if the engine does not have it."""
        try:
            image = self.client.images.get(reference)
        except docker.errors.NotFound:
            try:
                image = self.client.images.pull(reference, tag=None if _has_tag(reference) else "latest")
            except docker.errors.APIError as error:
                raise ImpossibleError(
                    f"there is no image {reference}",
                    why=f"the engine does not have it and cannot pull it: {error.explanation or error}",
                    tries=("docker images lists those there are", "torchyard load CELL brings a cell into the engine"),
                ) from error
        except docker.errors.APIError as error:
            raise ImpossibleError(
                f"{reference} is no name of an image", why=str(error.explanation or error), tries=("NAME:TAG",)
            ) from error
        platform = f"{image.attrs.get('Os', 'linux')}/{image.attrs.get('Architecture', '?')}"
        return Found(reference=reference, digest=str(image.id), platform=platform)

    @_translated
    def watch(
        self,
        image: Found,
        argv: Sequence[str],
        *,
        files: Mapping[str, bytes],
        allowance: Allowance,
        on_line: Callable[[str], None],
        deadline_s: float,
    ) -> Ended:
        """Run a command in a confined container, under the image's own user, and pass on its lines as they come.

        The files travel into a volume: nothing else can be written to before a container with a read-only root
        starts, and unlike a mount it works with an engine on another machine.
        """
        container = self._confined(image, argv, allowance)
        ended: list[End] = []

        def end(why: End) -> None:
            ended.append(why)
            with contextlib.suppress(docker.errors.DockerException, requests.RequestException):
                container.kill()

        timer = threading.Timer(deadline_s, end, [End.DEADLINE])
        with ThreadPoolExecutor(1) as waiting, contextlib.ExitStack() as opened:
            # Asked before the start: of a container that was removed, the engine tells nothing any more.
            code = waiting.submit(self._exit_code, str(container.id), int(deadline_s) + WORK_S)
            try:
                for directory, members in _by_directory(files).items():
                    container.put_archive(directory, _archive(members))
                output = opened.enter_context(self._attached(str(container.id)))
                try:
                    container.start()
                except docker.errors.APIError as error:
                    if re.search(r"executable file .*not found|exec: .*(no such file|permission denied)", str(error)):
                        return Ended(how=End.NO_PROGRAM)
                    raise _cannot_start(image, error) from error
                timer.start()
                # Beside the reading: the engine does not answer before somebody has read what it still has.
                flood = threading.Thread(target=end, args=[End.FLOOD], daemon=True)
                for line in _lines(output, flooded=flood.start):
                    on_line(line)
            finally:
                timer.cancel()
                # It removes itself when it ends, but not if it never began or is still running.
                with contextlib.suppress(docker.errors.APIError, requests.RequestException):
                    container.remove(force=True, v=True)
        if not ended and code.result() in NOT_STARTED:
            ended.append(End.NO_PROGRAM)
        return Ended(how=ended[0] if ended else End.ITSELF, code=code.result())

    @contextlib.contextmanager
    def _attached(self, container: str) -> Iterator[Iterator[bytes]]:
        """Open what a container prints to both streams, as it comes; docker-py's `attach` leaves its socket open."""
        parameters = {"stdout": 1, "stderr": 1, "stream": 1}
        connection = self.client.api.attach_socket(container, params=parameters)
        try:
            yield (piece for _, piece in frames_iter(connection, tty=False))  # type: ignore[no-untyped-call]
        finally:
            # docker-py keeps the response with the socket, so that both live; its end closes both.
            getattr(connection, "_response", connection).close()

    def _confined(self, image: Found, argv: Sequence[str], allowance: Allowance) -> Container:
        gpus = []
        if allowance.gpus != "none":
            count = -1 if allowance.gpus == "all" else int(allowance.gpus)
            gpus = [DeviceRequest(count=count, capabilities=[["gpu"]])]
        try:
            return self.client.containers.create(
                image.digest,
                # Not the image's own: what it prints and waits for is not what is asked.
                entrypoint=[argv[0]],
                command=list(argv[1:]),
                # Of a run that was killed nothing stays: the suite ends by itself, and then the engine removes it.
                auto_remove=True,
                labels={CONFINED_LABEL: image.digest},
                user=allowance.user,
                working_dir="/",
                network_mode="none",
                read_only=True,
                tmpfs={"/tmp": f"rw,exec,nosuid,nodev,mode=1777,size={TMP_BYTES}"},  # noqa: S108 (the container's own)
                volumes=[BOX],
                shm_size=allowance.shm_bytes,
                init=True,
                cap_drop=["ALL"],
                security_opt=["no-new-privileges"],
                pids_limit=4096,
                healthcheck={"test": ["NONE"]},
                device_requests=gpus,
                # What it prints is read as it comes; a flood of it must not fill the engine's disk.
                log_config=LogConfig(type="none"),
            )
        except docker.errors.APIError as error:
            raise _cannot_start(image, error) from error

    def _exit_code(self, container: str, timeout_s: int) -> int | None:
        """Wait until a container that removes itself is gone; return its exit code, None if that was missed."""
        try:
            return int(self.client.api.wait(container, timeout=timeout_s, condition="removed")["StatusCode"])
        except (docker.errors.DockerException, requests.RequestException):
            return None

    @_translated
    def tag(self, digest: str, tags: Sequence[str]) -> None:
        """Point the tags at the image and drop the name it had before its proof.

        An image that loses its last name by that is removed: it was the cell's former one, of up to 12 GB.
        """
        image = self.client.images.get(digest)
        former = {str(self.client.images.get(tag).id) for tag in tags if self._names(tag)} - {digest}
        for tag in tags:
            image.tag(*tag.rsplit(":", 1))
        for old in former:
            if not self._names(old):
                self._remove(old)
        self.discard(digest)

    @_translated
    def untag(self, tags: Sequence[str]) -> None:
        """Remove the tags; an image goes with its last name, and one that somebody named otherwise stays."""
        for tag in tags:
            self._remove(tag)

    @_translated
    def discard(self, digest: str) -> None:
        """Drop the name that an image has before its proof; the image goes with it if it has no other."""
        for name in self._names(digest):
            if name.startswith(f"{UNPROVEN}:"):
                self._remove(name)

    def _remove(self, reference: str) -> None:
        with contextlib.suppress(docker.errors.ImageNotFound):
            self.client.images.remove(reference)

    def _names(self, reference: str) -> list[str]:
        try:
            return list(self.client.images.get(reference).tags)
        except docker.errors.ImageNotFound:
            return []

    @_translated
    def has(self, digest: str) -> bool:
        """Tell whether the engine holds the image."""
        try:
            self.client.images.get(digest)
        except docker.errors.ImageNotFound:
            return False
        return True

    @_translated
    def load(self, archive: Iterable[bytes], *, progress: Callable[[int], None] | None = None) -> None:
        """Stream an archive of images into the engine; `progress` is called with the size of each piece it took.

        What raises while the archive is read is raised here, and the engine, which sees the stream break off, makes
        no image. Afterwards the caller asks `holds`: Docker 28 also takes, without a word, an image that lacks layers
        or came with wrong bytes.
        """

        def told() -> Iterator[bytes]:
            for piece in archive:
                if piece:  # an empty one would end the stream
                    yield piece
                    if progress:
                        progress(len(piece))

        for message in self.client.api.load_image(told(), quiet=True):  # type: ignore[no-untyped-call]
            if "error" in message:
                raise _load_error(str(message["error"]).strip())

    @_translated
    def holds(self, digest: str) -> bool:
        """Tell whether the engine has every byte of the image; one older than Docker 28 cannot say, and is believed."""
        api = self.client.api
        # docker-py has no method that takes `manifests`.
        url = f"{api.base_url}/v{api.api_version}/images/{digest}/json"
        answer = api.get(url, params={"manifests": "true"}, timeout=WORK_S)
        if answer.status_code == requests.codes.not_found:
            return False
        answer.raise_for_status()
        manifests = answer.json().get("Manifests") or ()
        return all(manifest.get("Available", True) for manifest in manifests)

    @_translated
    def whole(self) -> tuple[str, ...]:
        """Return the digests of the images of which the engine has every byte; one older than Docker 28 names none."""
        api = self.client.api
        url = f"{api.base_url}/v{api.api_version}/images/json"
        answer = api.get(url, params={"manifests": "true"}, timeout=WORK_S)
        answer.raise_for_status()
        manifests = [manifest for image in answer.json() for manifest in image.get("Manifests") or ()]
        return tuple(str(manifest["ID"]) for manifest in manifests if manifest.get("Available"))

    def build_cache(self) -> frozenset[str]:
        """Return the ids of what BuildKit keeps at the moment."""
        command = [self._docker, "buildx", "du", "--builder", "default", "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = set()
        for line in done.stdout.splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                found.add(str(json.loads(line)["ID"]))
        return frozenset(found)

    def forget_builds(self, *, since: frozenset[str]) -> None:
        """Drop what BuildKit has kept since `since`, and leave what the user's own builds had left before.

        A CUDA cell leaves about 13 GB: the wheels it was sent and the installed tree.
        """
        new = sorted(self.build_cache() - since)
        if new:
            # One expression for all: of several --filter options with one key, buildx takes none.
            command = [self._docker, "buildx", "prune", "--builder", "default", "--force", "--all",
                       "--filter", f"id~=^({'|'.join(new)})$"]  # fmt: skip
            subprocess.run(command, capture_output=True, check=False)


def _follow(command: Sequence[str], log: BuildkitLog, environment: Mapping[str, str]) -> int:
    """Run the client, feeding its progress to `log`; on an interrupt it is ended before we go on."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", errors="replace", env=dict(environment), start_new_session=True,
    )  # fmt: skip
    try:
        stream: IO[str] | None = process.stderr
        assert stream is not None
        for line in stream:
            log.feed(line)
        return process.wait()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _build_error(plan: Plan, log: BuildkitLog) -> CellFailedError | EngineError:
    failure = log.failure
    if failure is None:
        text = "\n".join(log.trailer[-LAST_LINES:])
        return EngineError(
            f"{plan.cell.id}: BuildKit could not build", why=text or "it gave no reason", tries=REMEDIES[1:]
        )
    step, reason, lines = failure
    return CellFailedError(
        f"{plan.cell.id}: a build step failed ({reason})", where=step, why="\n".join(lines) or "it printed nothing"
    )


def _load_error(reason: str) -> DiskError | EngineError:
    if "no space left on device" in reason:
        return DiskError(
            "the disk of the container engine is full",
            why=reason,
            tries=("docker system df says what takes it, docker system prune makes room",),
        )
    return EngineError("the container engine could not load the image", why=reason, tries=REMEDIES[1:2])


def _by_directory(files: Mapping[str, bytes]) -> dict[str, dict[str, bytes]]:
    grouped: dict[str, dict[str, bytes]] = {}
    for path, content in files.items():
        pure = PurePosixPath(path)
        grouped.setdefault(str(pure.parent), {})[pure.name] = content
    return grouped


def _archive(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.mtime = len(content), 0o444, int(time.time())
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _has_tag(reference: str) -> bool:
    return "@" in reference or ":" in reference.rpartition("/")[2]


def _lines(output: Iterable[bytes], *, flooded: Callable[[], None]) -> Iterator[str]:
    """Cut what a container prints into lines; calls `flooded` if it is too much, and reads on until it has ended."""
    rest, total = bytearray(), 0
    for piece in output:
        if total > MOST_PRINTED:
            continue
        total += len(piece)
        if total > MOST_PRINTED:
            rest.clear()
            flooded()
            continue
        *lines, last = piece.split(b"\n")
        for line in lines:
            rest += line
            yield rest.decode("utf-8", "replace").rstrip("\r")
            rest.clear()
        rest += last
    if rest:
        yield rest.decode("utf-8", "replace")


def _cannot_start(image: Found, error: docker.errors.APIError) -> ImpossibleError | EngineError:
    """Return the error for a container that the engine would not start."""
    text = str(error.explanation or error)
    if "could not select device driver" in text or "nvidia-container-cli" in text or "unresolvable CDI" in text:
        return EngineError(
            "the engine cannot give a container a GPU",
            where=image.reference,
            why=text,
            tries=(
                "install the NVIDIA Container Toolkit: nvidia-ctk runtime configure --runtime=docker, then restart it",
                'torchyard explain "<the message above>"',
                "validate without: --gpus none",
            ),
        )
    return ImpossibleError(
        "no container of the image can be started", where=image.reference, why=text,
        tries=(f"the image is for {image.platform}: use a machine of that kind, or qemu-user-static",),
    )  # fmt: skip


def _collect(container: Container, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for path in paths:
        try:
            chunks, _ = container.get_archive(path)
        except docker.errors.NotFound:
            continue
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
            member = archive.next()
            content = archive.extractfile(member) if member is not None and member.isfile() else None
            if content is not None:
                yield path, content.read()


def _innermost(error: BaseException) -> str:
    """Say the cause in one line: docker-py wraps it several times."""
    cause: Any = error
    for _ in range(10):
        inner = next((arg for arg in getattr(cause, "args", ()) if isinstance(arg, BaseException)), None)
        if inner is None:
            break
        cause = inner
    text = str(getattr(cause, "explanation", None) or cause).strip() or type(cause).__name__
    # urllib3 puts the operating system's own error into a tuple into a string: ('Connection aborted.', ...(2, 'No such
    # file or directory')).
    system = re.search(r"Error\(\d+, '([^']+)'\)|\[Errno -?\d+\] ([^\"')]+)", text)
    return str(system[1] or system[2]) if system else text.splitlines()[0]
