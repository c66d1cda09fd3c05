"""The paper's table 2, VL-Adapter's four tasks about pictures: what their files hold, and the rules that score them.

Read and scored as VL-Adapter (545fcbb, f1bbfd0) does it; where its data lies: `tasks.features`.
"""
