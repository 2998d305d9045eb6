"""Small transforms that exercise every function at every kind of site; registered by the tests' conftest."""
