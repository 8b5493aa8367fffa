"""The laboratory of the notebooks: drawn streets, the thesis' experiments, diagrams and the headless runner."""
