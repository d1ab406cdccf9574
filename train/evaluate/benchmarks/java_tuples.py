"""Classes of Java that the programs of MultiPL-E import from org.javatuples, with what the tests use of them.

They are written here, since a JDK does not bring the library: `with`, the constructors, `getValue0` and so on,
`equals`, `hashCode`, `toString`.
"""

_NAMES = ("Unit", "Pair", "Triplet", "Quartet", "Quintet", "Sextet", "Septet", "Octet", "Ennead", "Decade")


def _tuple(name: str, size: int) -> str:
    numbers = range(size)
    types = ", ".join(f"T{n}" for n in numbers)
    parameters = ", ".join(f"T{n} value{n}" for n in numbers)
    values = ", ".join(f"value{n}" for n in numbers)
    getters = "\n".join(f"    public T{n} getValue{n}() {{ return (T{n}) values.get({n}); }}" for n in numbers)
    return f"""package org.javatuples;

import java.util.*;

@SuppressWarnings("unchecked")
public final class {name}<{types}> extends Tuple {{
    public {name}({parameters}) {{ super({values}); }}
    public static <{types}> {name}<{types}> with({parameters}) {{ return new {name}<{types}>({values}); }}
{getters}
}}
"""


_BASE = """package org.javatuples;

import java.util.*;

public abstract class Tuple implements Iterable<Object> {
    final List<Object> values;
    Tuple(Object... values) { this.values = Collections.unmodifiableList(Arrays.asList(values)); }
    public int getSize() { return values.size(); }
    public Object getValue(int position) { return values.get(position); }
    public List<Object> toList() { return values; }
    public boolean contains(Object value) { return values.contains(value); }
    public Iterator<Object> iterator() { return values.iterator(); }
    @Override public String toString() { return values.toString(); }
    @Override public int hashCode() { return values.hashCode(); }
    @Override public boolean equals(Object other) {
        return other != null && getClass() == other.getClass() && values.equals(((Tuple) other).values);
    }
}
"""

JAVA_TUPLES: dict[str, bytes] = {
    "org/javatuples/Tuple.java": _BASE.encode(),
    **{f"org/javatuples/{name}.java": _tuple(name, size).encode() for size, name in enumerate(_NAMES, 1)},
}
"""Sources by path, for `Sandbox.run(files=...)`."""
