"""The maths of the models, a subject a file. Knows no engine, process group or file format."""
