"""How coefficients are learned: the compiled step, the loop, the choice by held-out data."""
