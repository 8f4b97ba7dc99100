"""A renderer turns a job's input into files; no statement here."""
