"""Diffusion: schedules, predictions, samplers, losses and times as pure functions around one denoiser contract.

    schedules    x_t = alpha x0 + sigma eps, tables and continuous      grids      the rows a sampler walks
    predictions  what a network says -> x0                              samplers   ancestral, DDIM/Euler, Langevin
    losses       noised batches, weights, variational bound             multistep  Heun, DPM-Solver++, PNDM
    times        which times to train at                                solvers    samplers by name, with their grids

Training, with a network (x [b, h, w, c], t [b], cond) -> eps:

    schedule = schedules.discrete(schedules.betas("scaled_linear"))
    t = times.sample_times(t_key, len(x0), schedule)
    noised = losses.diffuse(noise_key, x0, schedule, t)
    inputs = predictions.kind_of("eps").inputs(noised.x, noised.step)
    value = losses.loss(network(*inputs, cond), noised, "eps", losses.min_snr(5.0)).mean()

Sampling, in one program for every number of steps up to 100, every guidance scale and every seed:

    sampler, grid = solvers.solver("ddim", schedule, steps, 100, offset=1, final="first")
    denoise = guidance.mix(predictions.denoiser(network, "eps"), [cond, uncond], guidance.cfg(scale))
    x = jax.random.normal(start_key, (b, h, w, c))
    x0 = sample(denoise, sampler, grid, key, x, num_steps=grids.rows(grid))

Edits and hooks go around the same call: `vgen.edit.compose.run`.
"""
