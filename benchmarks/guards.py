"""Are the guards guarded? Takes each out in turn, in a copy of the tree, and counts the tests that notice.

    python benchmarks/guards.py [--only WORD] [--out benchmarks/TRUST.md]

A guard that no test notices is no guard: the command ends with code 1 then. With ``--out`` the table goes into the
file, between the marks. A run takes ten minutes; that the table fits the code is a test (tests/test_guards.py).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKS = "<!-- guards -->", "<!-- /guards -->"


@dataclass(frozen=True)
class Guard:
    """``text`` stands once in ``file``; with ``instead`` in its place the guard is gone. ``tests``: a file and an
    expression for pytest's -k."""

    what: str
    file: str
    text: str
    instead: str
    tests: str


def _of(file: str, tests: str, *rows: tuple[str, str, str, str]) -> Iterator[Guard]:
    for what, text, instead, expression in rows:
        yield Guard(what, file, text, instead, f"tests/{tests}.py {expression}")


GUARDS = (
    *_of(
        "i2l_ext/webui/access.py", "test_access",
        ("a name that is made to point at us (DNS rebinding)",
         'if self._names is not None and not self._is_ours(_split(f"//{host}").hostname or ""):', "if False:",
         "made_to_point or names_are"),
        ("the page of another origin", "if origin is not None and _split(origin).netloc != host:", "if False:",
         "other_sites or upload or socket"),
        ("a request that another site sends", 'if headers.get("sec-fetch-site", "none") not in ("none", "same-origin")'
         " and not _is_visit(method, headers):", "if False:", "other_sites or visit"),
        ("a visit only looks", 'return method == "GET" and how', "return how", "visit"),
        ("a visit is no frame", '("navigate", "document")', '("navigate", headers.get("sec-fetch-dest"))',
         "other_sites"),
        ("wrong credentials", 'if self._known and not self._is_known(headers.get("authorization", "")):', "if False:",
         "credentials"),
        ("another kind of credentials", 'if kind.lower() == "basic" else b""', "", "credentials"),
        ("web sockets too", 'if scope["type"] in ("http", "websocket"):', 'if scope["type"] == "http":', "socket"),
    ),
    *_of(
        "i2l_ext/webui/standalone.py", "test_access",
        ("the access policy before the whole stand-alone page",
         'options["app_kwargs"] = {"middleware": [Middleware(AccessMiddleware, policy)]}', "pass",
         "refuses or upload"),
        ("credentials before the page", '"auth": list(auth) or None', '"auth": None', "credentials_of_the_stand"),
        ("credentials before its HTTP interface", "add_api(app, service, list(auth))", "add_api(app, service)",
         "credentials_of_the_stand"),
    ),
    *_of(
        "i2l_ext/webui/extension.py", "test_access",
        ("the WebUI's credentials before the HTTP interface", "api.add_api(app, webui_service(), host.credentials())",
         "api.add_api(app, webui_service())", "credentials_of_a_webui"),
    ),
    *_of(
        "i2l_ext/webui/hosts/webui.py", "test_access",
        ("a WebUI in the network is not taken for a local one", "self.is_local = not exposed and", "self.is_local =",
         "not_local"),
        ("nor one bound to an address of the network", "and (not server or server in LOCAL_ADDRESSES)", "",
         "not_local"),
    ),
    *_of(
        "i2l_ext/webui/panes.py", "test_access",
        ("folders of the server: not offered in the network", "if service.host.is_local:", "if True:",
         "offers_no_folder"),
        ("folders of the settings: not offered in the network", "if setting.folder and not service.host.is_local:",
         "if False:", "not_shown"),
    ),
    *_of(
        "i2l_ext/webui/handlers.py", "test_access",
        ("folders of the server: not through a tunnel", "if not opened_locally(headers):", "if False:", "folder"),
        ("folders of the settings: not through a tunnel", "far = not opened_locally(request.headers)", "far = False",
         "settings"),
    ),
    *_of(
        "i2l_ext/webui/api.py", "test_webui_api",
        ("the access policy before every route", "policy.check(request.method, request.headers)", "pass",
         "sites or credentials"),
        ("a local WebUI's own names", "AccessPolicy(LOCAL_NAMES if service.host.is_local else None, credentials)",
         "AccessPolicy(None, credentials)",
         "sites"),
        ("JSON only as JSON (a form cannot send it)", 'if request.headers.get("content-type", "").partition(";")[0]'
         '.strip() != "application/json":', "if False:", "refusals"),
        ("forms only as forms", 'if not request.headers.get("content-type", "").startswith("multipart/form-data"):',
         "if False:", "refusals"),
        ("a body without length", "if not length.isdecimal():", "if False:", "length"),
        ("a body too large", "if int(length) > most:", "if False:", "refusals"),
        ("too many pictures", "if len(files) > most:", "if False:", "limits"),
    ),
    *_of(
        "i2l_ext/webui/client_fields.py", "test_webui_api",
        ("unknown fields", "set(texts) - set(fields)", "()", "refusals"),
        ("fields of another type", "if body[name] is None or not fields[name].accepts(body[name]):", "if False:",
         "of_their_type"),
        ("fields that are paths of this machine", " if not field.info.local", "", "no_path"),
    ),
    *_of(
        "i2l_ext/service/uploads.py", "test_webui",
        ("ids of pictures are hashes", "if isinstance(id, str) and _HASH.fullmatch(id) else None",
         "if isinstance(id, str) else None", "known_by"),
        ("an upload lies in the upload folder", "or not any(root in real.parents for root in roots)", "", "received"),
        ("links and dots are followed first", "path.resolve() if path.is_absolute()",
         "path.absolute() if path.is_absolute()", "received"),
        ("a path that is none: a NUL, half a character", "except (OSError, ValueError, RuntimeError):",
         "except OSError:", "received"),
        ("too many pictures of one LoRA", "if len(ids) > MAX_PICTURES:", "if False:", "known_by"),
    ),
    *_of(
        "i2l_ext/service/uploads.py", "test_access",
        ("a picture that does not end", "if size > MAX_BYTES:", "if False:", "does_not_end"),
        ("a bound on what is kept", "if kept > MAX_KEPT:", "if False:", "have_a_bound"),
    ),
    *_of(
        "i2l_ext/service/service.py", "test_access",
        ("LoRAs by the list alone", "found = self.loras().get(shown)",
         "found = self.loras().get(shown, self.host.lora_folder() / shown)", "other_places"),
        ("what a converted upload is called", 'names.clean_name(f"{Path(name).stem}-{key_format}")',
         'f"{Path(name).stem}-{key_format}"', "uploaded_file"),
        ("what an exported upload is called", 'names.clean_name(f"{Path(name).stem}-{start}")',
         'f"{Path(name).stem}-{start}"', "uploaded_file"),
    ),
    *_of(
        "i2l_ext/requests/fields.py", "test_access",
        ("key formats, trainers and hubs of their tables alone", "if info.choices and one not in info.choices:",
         "if False:", "options"),
    ),
    *_of(
        "i2l_ext/service/model_list.py", "test_access",
        ("models of the catalogue alone", 'row for row in rows if row["name"] == name), None)',
         'row for row in rows), None)', "catalogue"),
    ),
    *_of(
        "i2l_ext/service/targets.py", "test_access",
        ("names of LoRAs", "names.check_name(name.strip())", "name.strip()", "other_places"),
        ("names of sub-folders", "*map(names.check_name, parts)", "*parts", "other_places"),
        ("sub-folders from the root", 'subfolder.strip().startswith(("/", "\\\\")) or ', "", "other_places"),
    ),
    *_of(
        "i2l_ext/service/targets.py", "test_webui",
        ("a sub-folder that is a link to elsewhere", "if root.resolve() not in (folder.resolve(), *folder.resolve()"
         ".parents):", "if False:", "link_outside"),
    ),
    *_of(
        "i2l_ext/library/names.py", "test_names",
        ("foreign characters: separators, look-alikes, control codes", "if foreign := next(_foreign(name), \"\"):",
         "if foreign := None:", "bad_names"),
        ("letters of two scripts in a word", "for word, [first, *more] in _scripts(name) if more", "for word in ()",
         "bad_names"),
        ("names that a file system cannot hold", " or len(name.encode()) > LONGEST_BYTES", "", "bad_names"),
        ("over-long names", "lambda name: len(name) > LONGEST", "lambda name: False", "bad_names"),
        ("names that a shell or a host takes amiss", 'lambda name: name[0] in ".-" or name[-1] == "."',
         "lambda name: False", "bad_names"),
        ("dots in a row", 'lambda name: ".." in name', "lambda name: False", "bad_names"),
        ("Windows' devices", 'lambda name: name.split(".")[0].lower() in _RESERVED', "lambda name: False", "bad_names"),
        ("the name that means no LoRA", 'lambda name: name.lower() == "none"', "lambda name: False", "bad_names"),
    ),
    *_of(
        "i2l_ext/engine/temp_folder.py", "test_access",
        ("something else in the place of our folder in temp", "stat.S_ISDIR(status.st_mode)", "True", "in_temp"),
        ("our folder in temp: somebody else's", "status.st_uid == user", "True", "in_temp"),
        ("our folder in temp: open to others", "not status.st_mode & 0o022", "True", "in_temp"),
    ),
    *_of(
        "i2l_ext/engine/queue.py", "test_queue",
        ("the queue has an end", ">= MAX_WAITING:", ">= 10**9:", "has_an_end"),
    ),
    *_of(
        "i2l_ext/webui/markup.py", "test_webui",
        ("what is shown is escaped", "from html import escape", "escape = str", "escape"),
    ),
    *_of(
        "i2l_ext/library/folder.py", "test_library",
        ("only our own file is taken back", "if ours.st_ino and os.path.samestat(final.lstat(), ours):", "if True:",
         "taken_meanwhile or at_once"),
    ),
    *_of(
        "converters/atomic.py", "test_library",
        ("nothing is replaced, not even in a race", "os.link(temp, path)  #", "temp.replace(path)  #",
         "at_once or taken_meanwhile"),
        ("the same on a disk without links", "if os.path.lexists(path):  #", "if False:  #", "without_hard_links"),
    ),
    *_of(
        "converters/atomic.py", "test_faults",
        ("the same in a race on a disk without links", "_lock(descriptor, wait=True)", "pass", "without_hard_links"),
    ),
    *_of(
        "converters/headers.py", "test_converters_files",
        ("a header that claims too much", "if length > HEADER_LIMIT:", "if False:", "gigabyte"),
        ("more tensors than there can be", "if claimed > TENSOR_LIMIT:", "if False:", "wrong_files"),
        ("more values than there can be", "if values > VALUE_LIMIT:", "if False:", "memory"),
        ("a name twice", "if len(seen) != len(pairs):", "if False:", "wrong_files"),
        ("offsets that do not fit", "offsets[1] - offsets[0] != math.prod(shape) * BYTES[dtype]", "False",
         "wrong_files"),
        ("overlaps and gaps", "if info.start != end:", "if False:", "wrong_files"),
        ("a rest behind the tensors", "if 8 + length + end < size:", "if False:", "wrong_files"),
        ("a file that is cut", "if 8 + length + end > size:", "if False:", "wrong_files"),
        ("counts that are none", "return type(n) is int and 0 <= n < 1 << 48", "return True", "wrong_files"),
    ),
    *_of(
        "converters/files.py", "test_converters_files",
        ("a file that is replaced while it is read", "if self._stat() != self._stamp:", "if False:", "changes_while"),
    ),
    *_of(
        "converters/lora.py", "test_converters_lora",
        ("values that are not finite", "if not files.all_finite(piece, self.spec.dtype):", "if False:",
         "finite or nan"),
    ),
    *_of(
        "i2l_ext/images.py", "test_images",
        ("formats by the list", "formats=_formats()", "formats=None", "not_a_picture"),
        ("too many pixels, before they are decoded", "if short * long > MAX_PIXELS:", "if False:", "bombs or cap"),
        ("too narrow", "if long > MAX_RATIO * short:", "if False:", "bombs"),
        ("too many bytes", "if len(data) > MAX_BYTES:", "if False:", "too_many_bytes"),
    ),
    *_of(
        "i2l_ext/images.py", "test_image_plugins",
        ("a JPEG XL's size, before it is decoded", "_check_size(stated, name)", "pass", "bomb"),
    ),
    *_of(
        "i2l_ext/images.py", "test_crops",
        ("a square beyond the picture", "if crop.box[2] > width or crop.box[3] > height:", "if False:",
         "beyond or made_up"),
    ),
    *_of(
        "i2l_ext/requests/crops.py", "test_crops",
        ("a square is three numbers", "if found is None and text != CENTRE:", "if False:", "text_is or made_up"),
    ),
    *_of(
        "i2l_ext/models/download.py", "test_store_download",
        ("what comes is what the hub's sha256 says", "if digest(part, remote.digest, self.callbacks) != remote.digest:",
         "if False:", "wrong_bytes"),
        ("a file that was there", "if final.stat().st_size != remote.size or digest(final, remote.digest, self."
         "callbacks) != remote.digest:", "if False:", "overwritten"),
        ("more than was announced", "if self.tell() + len(chunk) > self.limit:", "if False:", "announced"),
    ),
    *_of(
        "i2l_ext/models/checked_files.py", "test_store_download",
        ("a checkpoint that has changed since", "if digest(path, noted, callbacks or DownloadCallbacks()) != noted:",
         "if False:", "sees_a_change"),
    ),
    *_of(
        "i2l_ext/models/download.py", "test_store_download",
        ("names in a repository that lead out of its folder", "not all(_is_inside(name) for name in names)", "False",
         "lead_out"),
    ),
    *_of(
        "i2l_ext/v2_models/run.py", "test_templates",
        ("code of others without consent", "if not has_consent(repository):", "if False:", "without_consent"),
        ("a result that is a link", "if source.is_symlink() or not source.is_file():", "if not source.is_file():",
         "pickle_a_link"),
        ("a result of another model", "if reading.arch is not arch:", "if False:", "not_believed"),
        ("a result too large", "if source.stat().st_size > RESULT_LIMIT:", "if False:", "pickle_a_link"),
        ("a result with other tensors than a LoRA's", "if odd or reading.networks:", "if False:", "not_believed"),
        ("a result of other numbers than floats", 'if info.dtype not in ("F32", "BF16", "F16"):', "if False:",
         "not_believed"),
        ("a result that is not finite", "if not all(all_finite(piece, info.dtype) for piece in file.chunks(name)):",
         "if False:", "not_believed"),
        ("a template that does not end", "if time.monotonic() - start > bounds.seconds:", "if False:", "may and time"),
        ("a template that eats memory", "elif used.memory > bounds.memory:", "elif False:", "may and memory"),
        ("a template that forks", "elif used.processes > bounds.processes:", "elif False:", "may and processes"),
    ),
    *_of(
        "i2l_ext/v2_models/repository.py", "test_templates",
        ("links in a template", "if path.is_symlink() or not (path.is_file() or path.is_dir()):",
         "if not (path.is_file() or path.is_dir()):", "is_no_template"),
        ("more files than a template has", "if len(found) == MOST_FILES:", "if False:", "is_no_template"),
        ("every file of a template counts",
         'lines = "".join(f"{sha}  {name}\\n" for name, sha in self.hashes.items())',
         "lines = self.hashes[CODE]", "every_file_counts"),
    ),
    *_of(
        "i2l_ext/v2_models/repository.py", "test_webui_consent",
        ("characters that do not show, in code that is shown",
         'c if c.isprintable() or c in "\\n\\t" else ascii(c)[1:-1]',
         "c", "page_shows"),
    ),
    *_of(
        "i2l_ext/v2_models/setup.py", "test_templates_setup",
        ("packages of a set-up against their hashes", '"--no-deps", "--require-hashes", "-r"', '"--no-deps", "-r"',
         "whole_or_not"),
        ("a set-up that does not run", '_run([str(python), "-I", str(Path(child.__file__).resolve()), "check"], '
         "lambda line: None, callbacks)", "pass", "whole_or_not"),
    ),
    *_of(
        "i2l_ext/v2_models/cage.py", "test_templates",
        ("the environment of a template", "return {**passed, **places, **offline}",
         "return {**os.environ, **places, **offline}", "cage_stops and environment"),
        ("the files and the network of a template", 'return [*_WRAPPERS[self.name](run), *run.command]',
         "return [*run.command]", "cage_stops"),
    ),
    *_of(
        "i2l_ext/v2_models/consent.py", "test_templates",
        ("consent to another hash", "if digest.strip().lower() != repository.digest:", "if False:", "one_hash"),
    ),
    *_of(
        "i2l_ext/service/consent.py", "test_webui_api",
        ("agreeing from the network", "if not self._service.host.is_local:  # agree", "if False:",
         "v2_model_over_http"),
        ("agreeing to what nobody was shown",
         'if (model, digest) not in ((job.title, job.result["digest"]) for job in done):',
         "if False:", "v2_model_over_http"),
    ),
    *_of(
        "i2l_ext/service/consent.py", "test_webui_consent",
        ("a page answers its own question", "if offered is None:", "if False:", "page_shows"),
        ("setting up from the network", "if not self._service.host.is_local:  # set up", "if False:", "from_elsewhere"),
    ),
    *_of(
        "i2l_ext/webui/actions.py", "test_webui_consent",
        ("agreeing through a tunnel", 'if said.get("action") in HERE_ALONE and not opened_here:', "if False:",
         "from_elsewhere"),
    ),
    *_of(
        "i2l_ext/service/service.py", "test_webui_service",
        ("a training started from the network", "if not self.host.is_local:", "if False:", "training_is_started"),
    ),
    *_of(
        "i2l_ext/operations/training_data.py", "test_training_data",
        ("an upload that is another picture", "hashlib.sha256(path.read_bytes()).hexdigest() == digest", "True",
         "changed_upload"),
    ),
    *_of(
        "i2l_ext/models/hubs.py", "test_store_download",
        ("no checksum, no download", 'if size is None or len(digest) not in (40, 64) or set(digest) - set("0123456789'
         'abcdef"):', "if False:", "no_checksum"),
    ),
    *_of(
        "i2l_ext/models/store.py", "test_store",
        ("shards lie beside their index", "or not all(_is_plain(name) for name in names)", "", "list_of_shards"),
        ("a checkpoint of another structure", "if checkpoint.structure_md5 not in (None, found):", "if False:",
         "what_is_wrong"),
    ),
)  # fmt: skip


def noticed(guard: Guard, tree: Path) -> int:
    """How many tests fail without the guard. Raises RuntimeError where they could not be run."""
    path = tree / guard.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(guard.text) != 1:
        raise RuntimeError(f"{guard.what}: its text does not stand once in {guard.file}")
    path.write_text(whole.replace(guard.text, guard.instead), encoding="utf-8")
    file, _, expression = guard.tests.partition(".py ")
    command = [sys.executable, "-m", "pytest", f"{file}.py", "-k", expression, "--tb=no", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        ended = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=300)
        said = ended.stdout
    except subprocess.TimeoutExpired:
        return 1  # without it the tests hang: that is noticed as well
    finally:
        path.write_text(whole, encoding="utf-8")
    if ended.returncode not in (0, 1):
        raise RuntimeError(f"{guard.what}: {' '.join(command)} ended with {ended.returncode}\n{said}{ended.stderr}")
    return len(re.findall(r"^(?:FAILED|ERROR) ", said, re.MULTILINE))


def copy(folder: Path) -> Path:
    """The tree as it stands, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def table(counts: dict[Guard, int], recorded: str) -> str:
    """A row for each guard, as measured now or, where it was not, as it stands in ``recorded``."""
    known = {}
    for guard in GUARDS:
        old = re.search(rf"^\| {re.escape(guard.what)} \| .* (\d+) \|$", recorded, re.MULTILINE)
        if guard in counts or old:
            known[guard] = counts.get(guard, int(old[1]) if old else 0)
    rows = [f"| {guard.what} | {guard.file} | {guard.tests.partition('.py ')[0]}.py | {count} |"
            for guard, count in known.items()]  # fmt: skip
    missed = sum(not count for count in known.values())
    tried = f"{len(known)} of {len(GUARDS)} guards tried, {missed} unnoticed"
    head = f"`python benchmarks/guards.py --out benchmarks/TRUST.md`: {tried}."
    return "\n".join((head, "", "| guard | file | tests | that notice |", "|---|---|---|---|", *rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="guards whose file or words hold this")
    parser.add_argument("--out", type=Path, help="put the table into this file, between its marks")
    args = parser.parse_args()
    chosen = [guard for guard in GUARDS if args.only in f"{guard.file} {guard.what}"]
    counts = {}
    with tempfile.TemporaryDirectory(prefix="i2l-guards-") as folder:
        tree = copy(Path(folder))
        for guard in chosen:
            counts[guard] = noticed(guard, tree)
            print(f"{counts[guard]:4}  {guard.file}: {guard.what}", flush=True)
            if args.out:  # at once, so that a run that is broken off was not for nothing
                start, end = MARKS
                before, _, rest = args.out.read_text(encoding="utf-8").partition(start)
                recorded, _, after = rest.partition(end)
                args.out.write_text(f"{before}{start}\n{table(counts, recorded)}\n{end}{after}", encoding="utf-8")
    missed = [guard.what for guard, count in counts.items() if not count]
    print(f"{len(counts)} guards; unnoticed: {', '.join(missed) or 'none'}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
