"""Triangle meshes from six file formats, and evenly spread points on their surface.

Every reader takes a file's content and returns a `Mesh`. Polygons become triangle fans, in file order. Only shape is
read: no materials, no texture coordinates, no animation. A damaged file raises `MeshError`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class MeshError(ValueError):
    """The content is not a mesh of the expected format, or its numbers contradict each other."""


class Mesh(NamedTuple):
    """Corners of the triangles, and which three of them each triangle joins."""

    vertices: Array  # (n_vertices, 3)
    faces: NDArray[np.int64]  # (n_faces, 3), indices into vertices


def make_mesh(vertices: Sequence[Sequence[float]] | Array, faces: Sequence[Sequence[int]] | NDArray[np.int64]) -> Mesh:
    """A checked `Mesh`: at least one triangle, finite corners, no index out of range."""
    corners = np.asarray(vertices, dtype=np.float64).reshape(-1, 3)
    triangles = np.asarray(faces, dtype=np.int64).reshape(-1, 3)
    if len(triangles) == 0:
        raise MeshError(f"no triangles ({len(corners)} vertices)")
    if triangles.min() < 0 or triangles.max() >= len(corners):
        raise MeshError(f"face indices {triangles.min()}..{triangles.max()} do not fit {len(corners)} vertices")
    if not np.isfinite(corners).all():
        raise MeshError("a vertex is not finite")
    return Mesh(corners, triangles)


def fan(polygon: Sequence[int]) -> list[tuple[int, int, int]]:
    """The triangles of a convex polygon, all sharing its first corner."""
    return [(polygon[0], polygon[k], polygon[k + 1]) for k in range(1, len(polygon) - 1)]


def z_up_to_y_up(mesh: Mesh) -> Mesh:
    """The mesh turned so that its z axis points along y, as in the formats that are y-up."""
    x, y, z = mesh.vertices.T
    return Mesh(np.stack([x, z, -y], axis=1), mesh.faces)


def sample_points(mesh: Mesh, count: int, seed: int = 0) -> NDArray[np.float32]:
    """(count, 3) points spread evenly over the surface, centred on their mean, inside the unit sphere.

    Triangles are drawn by area; the same mesh, count and seed give the same points.
    """
    rng = np.random.default_rng(seed)
    a, b, c = (mesh.vertices[mesh.faces[:, corner]] for corner in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    total = area.sum()
    if total <= 0:
        raise MeshError("the surface has no area")
    drawn = rng.choice(len(area), count, p=area / total)
    uniform = rng.random((count, 2))
    # the square root makes the barycentric coordinates uniform over the triangle
    root, second = np.sqrt(uniform[:, :1]), uniform[:, 1:]
    points = (1 - root) * a[drawn] + root * (1 - second) * b[drawn] + root * second * c[drawn]
    points -= points.mean(axis=0)
    return (points / np.linalg.norm(points, axis=1).max()).astype(np.float32)


def _floats(words: Sequence[str]) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise MeshError(f"expected numbers, found {' '.join(words)!r}") from error


def read_obj(text: str) -> Mesh:
    """Wavefront OBJ. Negative indices count back from the newest vertex."""
    vertices: list[list[float]] = []
    faces: list[tuple[int, int, int]] = []
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] == "v":
            vertices.append(_floats(words[1:4]))
        elif words[0] == "f":
            numbers = [int(word.partition("/")[0]) for word in words[1:]]
            faces += fan([n - 1 if n > 0 else len(vertices) + n for n in numbers])
    return make_mesh(vertices, faces)


class _Lines:
    """A cursor over a text's lines."""

    def __init__(self, lines: Sequence[str]) -> None:
        self._lines = lines
        self._at = 0

    def next(self) -> str:
        if self._at >= len(self._lines):
            raise MeshError("the file ends too early")
        self._at += 1
        return self._lines[self._at - 1]

    def next_int(self) -> int:
        line = self.next()
        try:
            return int(line)
        except ValueError as error:
            raise MeshError(f"expected a count, found {line!r}") from error

    def rest(self) -> Iterator[str]:
        while self._at < len(self._lines):
            yield self.next()


def read_ms3d_ascii(text: str) -> Mesh:
    """MilkShape 3D ASCII: every mesh of the file in one. Normals, materials and bones are passed over."""
    stripped = (line.strip() for line in text.splitlines())
    lines = _Lines([line for line in stripped if line and not line.startswith("//")])
    header = next((line for line in lines.rest() if line.startswith("Meshes:")), None)
    if header is None:
        raise MeshError("no 'Meshes:' line: not a MilkShape 3D ASCII file")
    vertices: list[list[float]] = []
    faces: list[tuple[int, int, int]] = []
    for _ in range(int(header.split()[1])):
        lines.next()  # name, flags, material
        base = len(vertices)
        for _ in range(lines.next_int()):
            vertices.append(_floats(lines.next().split()[1:4]))  # flags x y z u v bone
        for _ in range(lines.next_int()):
            lines.next()  # a normal
        for _ in range(lines.next_int()):
            a, b, c = (base + int(word) for word in lines.next().split()[1:4])  # flags a b c ...
            faces.append((a, b, c))
    return make_mesh(vertices, faces)


def read_ac3d(text: str) -> Mesh:
    """AC3D (.ac): the whole tree of objects, each placed by its own and its parents' `loc` and `rot`."""
    lines = _Lines(text.splitlines())
    if not lines.next().startswith("AC3D"):
        raise MeshError("no 'AC3D' header")
    vertices: list[Array] = []
    faces: list[tuple[int, int, int]] = []
    for line in lines.rest():
        if line.startswith("OBJECT"):
            _read_ac3d_object(lines, np.zeros(3), np.eye(3), vertices, faces)
    return make_mesh(np.array(vertices), faces)


def _read_ac3d_object(
    lines: _Lines, origin: Array, rotation: Array, vertices: list[Array], faces: list[tuple[int, int, int]]
) -> None:
    """Adds the object whose OBJECT line was just read, and its children. `kids` always closes an object."""
    base = len(vertices)
    for line in lines.rest():
        words = line.split()
        keyword = words[0] if words else ""
        if keyword == "loc":
            origin = origin + rotation @ np.array(_floats(words[1:4]))
        elif keyword == "rot":
            # the nine numbers are the images of the three axes, so they are the columns of the matrix
            rotation = rotation @ np.array(_floats(words[1:10])).reshape(3, 3).T
        elif keyword == "data":
            missing = int(words[1])  # characters of free text, which may hold line breaks
            while missing > 0:
                missing -= len(lines.next()) + 1
        elif keyword == "numvert":
            for _ in range(int(words[1])):
                vertices.append(origin + rotation @ np.array(_floats(lines.next().split()[:3])))
        elif keyword == "refs":
            faces += fan([base + int(lines.next().split()[0]) for _ in range(int(words[1]))])
        elif keyword == "kids":
            for _ in range(int(words[1])):
                while not lines.next().startswith("OBJECT"):
                    pass
                _read_ac3d_object(lines, origin, rotation, vertices, faces)
            return
    raise MeshError("an object has no 'kids' line: the file ends too early")


def _strip(corners: Sequence[int]) -> list[tuple[int, int, int]]:
    return [(corners[k], corners[k + 1], corners[k + 2]) for k in range(len(corners) - 2)]


def _in_groups(size: int) -> Callable[[Sequence[int]], list[tuple[int, int, int]]]:
    def triangles(corners: Sequence[int]) -> list[tuple[int, int, int]]:
        starts = range(0, len(corners) - size + 1, size)
        return [triangle for start in starts for triangle in fan(corners[start : start + size])]

    return triangles


_V3D_PRIMITIVES: dict[str, Callable[[Sequence[int]], list[tuple[int, int, int]]]] = {
    "polygon": fan,
    "quad": fan,
    "triangle": fan,
    "triangle_fan": fan,
    "triangles": _in_groups(3),
    "quads": _in_groups(4),
    "triangle_strip": _strip,
    "quad_strip": _strip,
}


def read_v3d(text: str) -> Mesh:
    """V3D (.3d), the text format of Search and Rescue: primitives of points, moved by `translate` lines.

    Other `begin_` blocks (header, models, colours) hold no points and are passed over.
    """
    vertices: list[Array] = []
    faces: list[tuple[int, int, int]] = []
    offset = np.zeros(3)
    primitive: str | None = None
    first = 0
    for line in text.splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        command = words[0]
        if command.startswith("begin_") and command[6:] in _V3D_PRIMITIVES:
            primitive, first = command[6:], len(vertices)
        elif primitive is not None:
            if command.startswith("end_"):
                faces += _V3D_PRIMITIVES[primitive](range(first, len(vertices)))
                primitive = None
            elif _is_number(command) and len(words) >= 3:
                vertices.append(offset + np.array(_floats(words[:3])))
        elif command == "translate":
            offset = offset + np.array(_floats(words[1:4]))
        elif command == "untranslate":
            offset = np.zeros(3)
    return make_mesh(np.array(vertices), faces)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def read_pmd(content: bytes) -> Mesh:
    """Pyrogenesis cached mesh (.pmd, versions 1 to 4), the model as it was bound to its skeleton.

    Little-endian: magic, version, size, vertex count, from version 4 on the number of texture coordinate sets; then
    per vertex position, normal, texture coordinates, four bone ids and four weights; then 16-bit triangles.
    """
    if content[:4] != b"PSMD":
        raise MeshError("no 'PSMD' header")
    try:
        version, _, vertex_count = struct.unpack_from("<III", content, 4)
        at = 16
        texture_sets = 1
        if version >= 4:
            (texture_sets,) = struct.unpack_from("<I", content, at)
            at += 4
        stride_bytes = 24 + 8 * texture_sets + 4 + 16
        rows = np.frombuffer(content, np.uint8, vertex_count * stride_bytes, at).reshape(vertex_count, stride_bytes)
        at += vertex_count * stride_bytes
        (face_count,) = struct.unpack_from("<I", content, at)
        faces = np.frombuffer(content, "<u2", face_count * 3, at + 4)
    except (struct.error, ValueError) as error:
        raise MeshError(f"the file ends too early: {error}") from error
    positions = np.ascontiguousarray(rows[:, :12]).view("<f4")
    return make_mesh(positions.astype(np.float64), faces.astype(np.int64))


def read_collada(text: str) -> Mesh:
    """COLLADA (.dae): every geometry that the scene shows, placed by its nodes, turned y-up."""
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise MeshError(f"not XML: {error}") from error
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # drop the namespace: 1.4 and 1.5 differ only there
    geometries = {geometry.get("id"): geometry for geometry in root.iter("geometry")}
    nodes = {node.get("id"): node for node in root.iter("node") if node.get("id")}
    scenes = {scene.get("id"): scene for scene in root.iter("visual_scene")}
    shown = root.find("scene/instance_visual_scene")
    scene = scenes.get(_target(shown)) if shown is not None else None
    if scene is None:
        raise MeshError("no visual scene")
    vertices: list[Array] = []
    faces: list[tuple[int, int, int]] = []

    def visit(node: ElementTree.Element, placed: Array) -> None:
        placed = placed @ _collada_transform(node)
        for child in node:
            if child.tag == "node":
                visit(child, placed)
            elif child.tag == "instance_node":
                visit(_lookup(nodes, child), placed)
            elif child.tag == "instance_geometry":
                corners, triangles = _collada_geometry(_lookup(geometries, child))
                base = len(vertices)
                vertices.extend(corners @ placed[:3, :3].T + placed[:3, 3])
                faces.extend((base + a, base + b, base + c) for a, b, c in triangles)

    for node in scene.findall("node"):
        visit(node, np.eye(4))
    mesh = make_mesh(np.array(vertices), faces)
    up = root.findtext("asset/up_axis", default="Y_UP").strip()
    if up == "Y_UP":
        return mesh
    if up == "Z_UP":
        return z_up_to_y_up(mesh)
    raise MeshError(f"up axis {up!r} is not supported")


def _target(element: ElementTree.Element) -> str:
    """The id that an element's url or source attribute refers to."""
    return (element.get("url") or element.get("source") or "").removeprefix("#")


def _lookup(table: dict[str | None, ElementTree.Element], reference: ElementTree.Element) -> ElementTree.Element:
    found = table.get(_target(reference))
    if found is None:
        raise MeshError(f"{reference.tag} refers to {_target(reference)!r}, which is not in the file")
    return found


def _collada_transform(node: ElementTree.Element) -> Array:
    """The product of a node's own transforms, in file order. (4, 4)"""
    product = np.eye(4)
    for child in node:
        step = np.eye(4)
        if child.tag == "matrix":
            step = np.array(_floats((child.text or "").split())).reshape(4, 4)
        elif child.tag == "translate":
            step[:3, 3] = _floats((child.text or "").split())
        elif child.tag == "scale":
            step[:3, :3] = np.diag(_floats((child.text or "").split()))
        elif child.tag == "rotate":
            *axis, degrees = _floats((child.text or "").split())
            step[:3, :3] = _rotation(np.array(axis), np.radians(degrees))
        product = product @ step
    return product


def _rotation(axis: Array, radians: float) -> Array:
    """Rotation matrix about an axis (Rodrigues' formula). (3, 3)"""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(radians) * cross + (1 - np.cos(radians)) * cross @ cross


def _collada_geometry(geometry: ElementTree.Element) -> tuple[Array, list[tuple[int, int, int]]]:
    """Positions (n, 3) and triangles of one geometry."""
    sources = {source.get("id"): source for source in geometry.iter("source")}
    position = geometry.find("mesh/vertices/input[@semantic='POSITION']")
    if position is None:
        raise MeshError(f"geometry {geometry.get('id')!r} has no positions")
    source = _lookup(sources, position)
    accessor = source.find("technique_common/accessor")
    stride = int(accessor.get("stride", "1")) if accessor is not None else 3
    numbers = _floats((source.findtext("float_array") or "").split())
    corners = np.array(numbers).reshape(-1, stride)[:, :3]
    triangles: list[tuple[int, int, int]] = []
    for kind in ("triangles", "polylist", "polygons"):
        for primitive in geometry.iter(kind):
            inputs = primitive.findall("input")
            width = 1 + max(int(entry.get("offset", "0")) for entry in inputs)
            offset = next(int(entry.get("offset", "0")) for entry in inputs if entry.get("semantic") == "VERTEX")
            polygons = [[int(word) for word in (p.text or "").split()][offset::width] for p in primitive.findall("p")]
            if kind == "polygons":
                sizes = [len(polygon) for polygon in polygons]
            elif kind == "polylist":
                sizes = [int(word) for word in primitive.findtext("vcount", default="").split()]
            else:
                sizes = [3] * (sum(len(polygon) for polygon in polygons) // 3)
            flat = [index for polygon in polygons for index in polygon]
            if sum(sizes) != len(flat):
                raise MeshError(f"{kind} names {len(flat)} corners, its polygons need {sum(sizes)}")
            start = 0
            for size in sizes:
                triangles += fan(flat[start : start + size])
                start += size
    return corners, triangles
