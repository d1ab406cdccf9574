"""The table of languages: what each needs, how it is checked, compiled and run. A language is a row."""

import dataclasses
from collections.abc import Mapping

from train.sandbox.job import Limits


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """One way to run a language. In commands, {memory} is the limit of memory in MiB, {half} half of it.

    Args:
      run: command that runs the program.
      version: command that prints the version and ends with status 0 where the tool chain can be used.
      compile: command that compiles the source, or None.
      check: command that checks the syntax without running anything, where that is cheap. Compilers check anyway.
      products: files that the compiler makes and the program needs.
      address_space: limit of each process's address space as a multiple of the limit of memory, or None for run times
        that reserve far more than they use.
      environment: variables.
      folders: patterns of absolute paths, besides /usr, that the tool chain reads.
    """

    run: tuple[str, ...]
    version: tuple[str, ...]
    compile: tuple[str, ...] | None = None
    check: tuple[str, ...] | None = None
    products: tuple[str, ...] = ("main",)
    address_space: float | None = 1.0
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    folders: tuple[str, ...] = ()

    @property
    def programs(self) -> tuple[str, ...]:
        """The programs that must be installed."""
        commands = (self.compile, self.run, self.check, self.version)
        names = (command[0] for command in commands if command is not None)
        return tuple(dict.fromkeys(name for name in names if not name.startswith("./")))

    def filled(self, command: tuple[str, ...], limits: Limits) -> tuple[str, ...]:
        """A command of this tool chain with its numbers for given limits."""
        memory = limits.memory_bytes >> 20
        return tuple(part.replace("{memory}", str(memory)).replace("{half}", str(memory // 2)) for part in command)


@dataclasses.dataclass(frozen=True)
class Language:
    """A programming language.

    Args:
      name: as users write it.
      extensions: of file names, the usual one first.
      toolchains: ways to run it; the first that is installed is used.
      install: Debian packages that bring one.
      others: further names.
      source: name of the source file, without extension.
    """

    name: str
    extensions: tuple[str, ...]
    toolchains: tuple[Toolchain, ...]
    install: str
    others: tuple[str, ...] = ()
    source: str = "main"

    @property
    def file(self) -> str:
        """The name of the source file."""
        return f"{self.source}{self.extensions[0]}"


_PYTHON_CHECK = "compile(open('main.py', 'rb').read(), 'main.py', 'exec', dont_inherit=True)"
_JAVA = ("java", "-Xmx{half}m", "-Xss16m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData")
_GO = {"GOCACHE": "/tmp/go", "GOPATH": "/tmp/gopath", "GO111MODULE": "off", "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}


def _native(compiler: str, *arguments: str) -> Toolchain:
    return Toolchain(run=("./main",), version=(compiler, "--version"), compile=(compiler, *arguments))


_C = ("-O2", "-std=gnu17", "-w", "-o", "main", "main.c", "-lm")
_CPP = ("-O2", "-std=gnu++20", "-w", "-o", "main", "main.cpp")

_ROWS = (
    Language(
        "python",
        (".py",),
        (
            Toolchain(
                run=("python3", "-B", "main.py"),
                version=("python3", "--version"),
                check=("python3", "-I", "-S", "-c", _PYTHON_CHECK),
            ),
        ),
        install="python3",
        others=("py", "python3"),
    ),
    Language(
        "javascript",
        (".js", ".mjs", ".cjs"),
        (
            Toolchain(
                run=("node", "--max-old-space-size={memory}", "main.js"),
                version=("node", "--version"),
                check=("node", "--check", "main.js"),
                address_space=None,
            ),
        ),
        install="nodejs",
        others=("js", "node"),
    ),
    Language(
        "typescript",
        (".ts",),
        (
            Toolchain(
                run=("node", "--max-old-space-size={memory}", "main.js"),
                version=("tsc", "--version"),
                compile=("tsc", "--target", "es2022", "--module", "commonjs", "main.ts"),
                products=("main.js",),
                address_space=None,
            ),
            # Node 22.6 and later drop the types; they check none.
            Toolchain(
                run=("node", "--experimental-strip-types", "--max-old-space-size={memory}", "main.ts"),
                version=("node", "--experimental-strip-types", "--version"),
                address_space=None,
            ),
        ),
        install="node-typescript, or Node 22.6 or later",
        others=("ts",),
    ),
    Language("c", (".c",), (_native("gcc", *_C), _native("clang", *_C)), install="gcc libc6-dev"),
    Language(
        "cpp",
        (".cpp", ".cc", ".cxx"),
        (_native("g++", *_CPP), _native("clang++", *_CPP)),
        install="g++",
        others=("c++",),
    ),
    Language(
        "java",
        (".java",),
        (
            Toolchain(
                run=(*_JAVA, "-cp", "classes", "Main"),
                version=("javac", "-version"),
                compile=("javac", "-nowarn", "-J-XX:+UseSerialGC", "-J-XX:-UsePerfData", "-d", "classes", "Main.java"),
                products=("classes",),
                address_space=None,
                folders=("/etc/java-*",),
            ),
        ),
        install="openjdk-17-jdk-headless",
        source="Main",
    ),
    Language(
        "go",
        (".go",),
        (
            Toolchain(
                run=("./main",),
                version=("go", "version"),
                compile=("go", "build", "-o", "main", "main.go"),
                address_space=None,
                environment=_GO,
            ),
        ),
        install="golang-go",
        others=("golang",),
    ),
    Language(
        "rust",
        (".rs",),
        (_native("rustc", "-O", "--edition", "2021", "-A", "warnings", "-o", "main", "main.rs"),),
        install="rustc",
        others=("rs",),
    ),
    Language(
        "csharp",
        (".cs",),
        (
            Toolchain(
                run=("mono", "main.exe"),
                version=("mcs", "--version"),
                compile=("mcs", "-warn:0", "-out:main.exe", "main.cs"),
                products=("main.exe",),
                address_space=None,
                folders=("/etc/mono",),
            ),
        ),
        install="mono-mcs",
        others=("c#", "cs"),
    ),
    Language(
        "php",
        (".php",),
        (
            Toolchain(
                run=("php", "-n", "-d", "memory_limit={memory}M", "main.php"),
                version=("php", "-n", "--version"),
                check=("php", "-n", "-l", "main.php"),
            ),
        ),
        install="php-cli",
    ),
    Language(
        "bash",
        (".sh", ".bash"),
        (
            Toolchain(
                run=("bash", "main.sh"),
                version=("bash", "--version"),
                check=("bash", "-n", "main.sh"),
            ),
        ),
        install="bash",
        others=("sh", "shell"),
    ),
    Language(
        "r",
        (".R", ".r"),
        (
            Toolchain(
                run=("Rscript", "--vanilla", "main.R"),
                version=("Rscript", "--version"),
                check=("Rscript", "--vanilla", "-e", "invisible(parse('main.R'))"),
                folders=("/etc/R",),
            ),
        ),
        install="r-base-core",
    ),
    Language(
        "perl",
        (".pl",),
        (Toolchain(run=("perl", "main.pl"), version=("perl", "--version")),),
        install="perl",
    ),
)

LANGUAGES: Mapping[str, Language] = {row.name: row for row in _ROWS}
