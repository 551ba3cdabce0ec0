"""The commands of ``seqmill``: a module for each thing that people come to do."""
