"""File formats: ISMRMRD HDF5 in and out, PNG out."""
