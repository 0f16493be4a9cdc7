"""The learning of coefficients: the compiled step, the loop, the choice by held-out data."""
