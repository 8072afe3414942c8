"""What is put into a model beside its matrices: between layers, or before its tokens."""
