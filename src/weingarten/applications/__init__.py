"""Things to do with curvature: each a package of its own, built on the library."""
