"""Finds in the source of a program where it writes into objects that are not its own.

Where an object comes from is followed through names, loops, fields, subscripts, and what the program passes to its own
functions. Its own are ``self``, what the fields of its classes hold, what its functions return, and what is made where
it is changed: a literal, a copy, an instance of a class. All else belongs to others. Tensors' values are not looked at.
"""

import ast
import builtins
from collections import defaultdict

# Where an object comes from: made here, the program's own, or the name by which the program has got it from others.
MADE = ""
OWN = "self"
# Methods that change what they are called on.
CHANGES = {"append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
# Functions that return something in their arguments, and those that make a new container of it.
ONE_OF = {"cast", "max", "min", "next"}
ALL_OF = {"chain", "dict", "enumerate", "filter", "iter", "list", "reversed", "set", "sorted", "tuple", "zip"}
# Methods that return something in what they are called on, and those that make a copy of it.
INSIDE = {"get", "items", "keys", "pop", "setdefault", "values"}
COPIES = {"__new__", "copy"}
# Instances of these classes hold only what the program has put into them.
OF_PROGRAM = {"DictConfig"}
FUNCTIONS = (ast.FunctionDef, ast.Lambda)
DISPLAYS = (ast.List, ast.Tuple, ast.Set, ast.Dict, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def worst(sources):
    """One of those of others, if there is any; None, which says nothing, only if there is nothing else."""
    known = [source for source in sources if source is not None]
    return max(known, key=lambda source: (source not in (MADE, OWN), source), default=None)


class Writes:
    """The writes of a program.

    Args:
        trees: the syntax trees of its modules.
        fields: the names of the attributes of its classes.
    """

    def __init__(self, trees, fields):
        self._fields = fields
        self._around = {part: node for tree in trees for node in ast.walk(tree) for part in ast.iter_child_nodes(node)}
        # {(function, class or module, name): [(a value, whether the name stands for something in the value)]}
        self._values = defaultdict(list)
        self._calls = defaultdict(list)
        self._classes = set()
        # What is being followed, which may lead to itself.
        self._followed = set()
        for tree in trees:
            for node in ast.walk(tree):
                self._learn(node)

    def of(self, tree):
        """The names of what ``tree`` writes: of an attribute, or of what an entry is written into."""
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=value, attr=name, ctx=ast.Store() | ast.Del()):
                    yield from self._attribute(value, name)
                case ast.Call(func=ast.Name(id="setattr" | "delattr"), args=[value, named, *_]):
                    name = named.value if isinstance(named, ast.Constant) else f"setattr({ast.unparse(value)})"
                    yield from self._attribute(value, name)
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="patch")), args=[value, ast.Constant(value=name), *_]
                ):
                    yield from self._attribute(value, name)
                case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()):
                    yield from self._entry(value)
                # A list that grows; a number that does is another object.
                case ast.AugAssign(target=value, value=added) if isinstance(added, DISPLAYS):
                    yield from self._entry(value)
                # The remove() of a handle has no argument.
                case ast.Call(func=ast.Attribute(value=value, attr=name), args=args) if name in CHANGES:
                    yield from self._entry(value) if (args or name != "remove") and not self._is_import(value) else ()
                # An entry that is written later.
                case ast.Attribute(value=value, attr="__setitem__") if self._source(value) != MADE:
                    yield ast.unparse(value)

    def _attribute(self, value, name):
        source = self._source(value)
        if not (is_self(value) or source == MADE or (source == OWN and name in self._fields)):
            yield name

    def _entry(self, value):
        source = self._source(value)
        if source not in (MADE, OWN):
            yield source

    def _learn(self, node):
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self._bind(target, value)
            case ast.AnnAssign(target=target, value=value) | ast.NamedExpr(target=target, value=value) if value:
                self._bind(target, value)
            case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                self._bind(target, value, inside=True)
            case ast.withitem(context_expr=value, optional_vars=target) if target:
                self._bind(target, value)
            case ast.ExceptHandler(type=value, name=str(name)):
                self._values[self._within(node, FUNCTIONS), name].append((value, False))
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                for alias in names:
                    name = alias.asname or alias.name.split(".")[0]
                    self._values[self._within(node, FUNCTIONS), name].append((node, False))
            case ast.arg(arg=name):
                self._values[self._within(node, FUNCTIONS), name].append((node, False))
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                self._values[self._within(self._around[node], FUNCTIONS), name].append((node, False))
                self._classes |= {name} if isinstance(node, ast.ClassDef) else set()
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(value=ast.Name(id="self"), attr=name)):
                self._calls[name].append(node)

    def _bind(self, target, value, *, inside=False):
        for part in ast.walk(target):
            match part:
                case ast.Name(id=name, ctx=ast.Store()):
                    self._values[self._within(part, FUNCTIONS), name].append((value, inside or part is not target))
                case ast.Attribute(value=of, attr=name, ctx=ast.Store()) if is_self(of):
                    self._values[self._within(part, ast.ClassDef), name].append((value, inside or part is not target))

    def _within(self, node, kinds):
        """The innermost function or class around ``node``, or the module."""
        while node in self._around and not isinstance(node, kinds):
            node = self._around[node]
        return node

    def _values_of(self, name):
        scope = self._within(name, FUNCTIONS)
        while (scope, name.id) not in self._values and scope in self._around:
            scope = self._within(self._around[scope], FUNCTIONS)
        return self._values.get((scope, name.id), [])

    def _is_import(self, node):
        values = self._values_of(node) if isinstance(node, ast.Name) else []
        return any(isinstance(value, ast.Import | ast.ImportFrom) for value, _ in values)

    def _source(self, node, inside=False):
        """Where ``node`` comes from, or with ``inside`` what is in it; None if that leads to where it began."""
        if (node, inside) in self._followed:
            return None
        self._followed.add((node, inside))
        try:
            return self._find(node, inside)
        finally:
            self._followed.discard((node, inside))

    def _all(self, values, inside):
        return worst(self._source(value, inside or within) for value, within in values)

    def _find(self, node, inside):
        match node:
            case ast.Name(id="self" | "cls") | ast.FunctionDef() | ast.ClassDef():
                return OWN
            case ast.Name(id=name):
                values = self._values_of(node)
                return self._all(values, inside) if values else MADE if hasattr(builtins, name) else name
            case ast.Import(names=[alias, *_]):
                return alias.name
            case ast.ImportFrom(module=module):
                return OWN if module.startswith("dynrank") else module
            case ast.arg():
                return self._argument(node, inside)
            case ast.Attribute(value=value, attr=name) if is_self(value):
                return worst([OWN, self._all(self._values[self._within(node, ast.ClassDef), name], inside)])
            case ast.Attribute(value=value, attr=name):
                source = self._source(value)
                return source if source == MADE or (source == OWN and name in self._fields) else name
            case ast.Subscript(value=value) | ast.Starred(value=value):
                return self._source(value, True)
            case ast.NamedExpr(value=value):
                return self._source(value, inside)
            case ast.IfExp(body=first, orelse=second):
                return worst([self._source(first, inside), self._source(second, inside)])
            case ast.BoolOp(values=values):
                return worst(self._source(value, inside) for value in values)
            case ast.Call():
                return self._call(node, inside)
            case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts) | ast.Dict(values=parts) if inside:
                return worst([MADE, *(self._source(part, deep) for part in parts for deep in (False, True))])
            case ast.ListComp(elt=part) | ast.SetComp(elt=part) | ast.GeneratorExp(elt=part) | ast.DictComp(value=part):
                return worst([self._source(part), self._source(part, True)]) if inside else MADE
        return MADE

    def _argument(self, node, inside):
        """An argument is the program's own if its class is; else it comes from where the program calls the function."""
        function = self._around[self._around[node]]
        if node in (function.args.vararg, function.args.kwarg):
            return node.arg if inside else MADE
        words = [part for part in ast.walk(node.annotation or node) if isinstance(part, ast.Name)]
        if any(word.id in OF_PROGRAM for word in words):
            return MADE
        if any(word.id in self._classes and self._source(word) == OWN for word in words):
            return OWN
        source = worst(self._source(given, inside) for given in self._given(function, node))
        return node.arg if source is None else source

    def _given(self, function, argument):
        """What the program passes as an argument of one of its functions."""
        is_method = isinstance(self._around[function], ast.ClassDef)
        name = getattr(function, "name", None)
        name = self._around[function].name if name == "__init__" else name
        places = [*function.args.posonlyargs, *function.args.args][is_method:]
        for call in self._calls[name]:
            # A function and a method may have one name.
            if isinstance(call.func, ast.Attribute) == (is_method and name == function.name):
                yield from (keyword.value for keyword in call.keywords if keyword.arg == argument.arg)
                yield from (value for place, value in zip(places, call.args, strict=False) if place is argument)

    def _call(self, node, inside):
        """Where what a call returns comes from."""
        match node:
            case ast.Call(func=ast.Name(id="vars" | "getattr" as function), args=[value, *names]):
                source = self._source(value)
                named = names[0].value if names and isinstance(names[0], ast.Constant) else None
                return source if source == MADE or is_self(value) else named or f"{function}({ast.unparse(value)})"
            case ast.Call(func=ast.Name(id=name), args=values) if name in ONE_OF | ALL_OF:
                return worst(self._source(value, True) for value in values) if inside or name in ONE_OF else MADE
            case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in INSIDE:
                return self._source(value, True)
            # list[int](), class_of(x)()
            case ast.Call(func=ast.Subscript() | ast.Call()):
                return MADE
        name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
        if name in COPIES or name.strip("_")[0].isupper():
            return MADE
        # A function of another library makes something; a method may return what its object has.
        library = node.func if isinstance(node.func, ast.Name) else node.func.value
        if self._is_import(library):
            return OWN if self._source(library) == OWN else MADE
        return self._find(node.func, inside)
