//! Attention kernels against their definition in f64.

mod common;

use common::{Matrix, Storage, Uniform, assert_close, values};
use half::{bf16, f16};
use host_kernels::{Argument, Buffer, Launch, LaunchError, shuffled};

/// A head size, and how its kernels are launched.
#[derive(Clone, Copy)]
struct Head {
    dim: usize,
    forward: Plan,
    queries: Plan,
    keys: Plan,
    tail: Plan,
}

/// What a kernel's name begins with; rows of a block, its threads and its shared memory.
#[derive(Clone, Copy)]
struct Plan {
    prefix: &'static str,
    rows: usize,
    threads: u32,
    shared_bytes: u32,
}

const fn plan(rows: usize, threads: u32, shared_bytes: u32) -> Plan {
    Plan { prefix: "attention", rows, threads, shared_bytes }
}

/// By Hopper's own instructions: warpgroups of 64 rows.
const fn hopper(warpgroups: usize, shared_bytes: u32) -> Plan {
    Plan { prefix: "attention_sm90a", ..plan(64 * warpgroups, 128 * warpgroups as u32, shared_bytes) }
}

const HEADS: [Head; 5] = [
    Head {
        dim: 32,
        forward: plan(128, 128, 20480),
        queries: plan(128, 128, 20480),
        keys: plan(128, 128, 20480),
        tail: plan(16, 32, 10752),
    },
    Head {
        dim: 40,
        forward: plan(128, 128, 20480),
        queries: plan(128, 128, 20480),
        keys: plan(128, 128, 20480),
        tail: plan(16, 32, 10752),
    },
    Head {
        dim: 64,
        forward: plan(128, 128, 36864),
        queries: plan(64, 128, 36864),
        keys: plan(64, 128, 37888),
        tail: plan(16, 32, 37888),
    },
    Head {
        dim: 80,
        forward: plan(64, 128, 45056),
        queries: plan(64, 128, 22528),
        keys: plan(64, 128, 23040),
        tail: plan(16, 32, 23040),
    },
    Head {
        dim: 160,
        forward: plan(64, 128, 43008),
        queries: plan(64, 128, 43008),
        keys: plan(64, 128, 64768),
        tail: plan(16, 32, 32512),
    },
];

/// By Hopper's own instructions, but for the tail.
const HOPPER: [Head; 3] = [
    Head { forward: hopper(2, 24576), queries: hopper(2, 20480), keys: hopper(2, 20480), ..HEADS[1] },
    Head { forward: hopper(1, 32768), queries: hopper(1, 32768), keys: hopper(1, 33792), ..HEADS[2] },
    Head { forward: hopper(1, 40960), queries: hopper(1, 40960), keys: hopper(1, 41984), ..HEADS[3] },
];

/// B images, H heads, sequences of queries and keys.
#[derive(Clone, Copy, Debug)]
struct Problem {
    images: usize,
    heads: usize,
    dim: usize,
    queries: usize,
    keys: usize,
    causal: bool,
    /// Added to queries and taken from keys: scores sink by about its square times 4 √D.
    offset: f64,
    seed: u64,
}

impl Problem {
    fn width(&self) -> usize {
        self.heads * self.dim
    }

    /// Steeper than 1/√D: with numbers in −1…1 the weights of keys then differ by an order of magnitude.
    fn scale(&self) -> f32 {
        4.0 / (self.dim as f32).sqrt()
    }

    fn launch<T: Storage>(
        &self,
        kernel: &str,
        plan: Plan,
        rows: usize,
        splits: usize,
        arguments: &[Argument<'_>],
    ) -> Result<(), LaunchError> {
        Launch {
            name: &format!("{}_{kernel}_{}_d{}", plan.prefix, T::NAME, self.dim),
            grid: [rows.div_ceil(plan.rows), self.heads, self.images * splits].map(|n| n as u32),
            block: [plan.threads, 1, 1],
            shared_bytes: plan.shared_bytes,
            cluster: 1,
        }
        .run(arguments)
    }
}

/// Tensors as stored: `[B, S, H·D]` each, with a gap of its own behind each row.
struct Tensors<T> {
    q: Matrix<T>,
    k: Matrix<T>,
    v: Matrix<T>,
    d_o: Matrix<T>,
    o: Matrix<T>,
    lse: Buffer<f32>,
}

/// What attention and its gradients are, and how far rounding may move them (in units of half an epsilon).
#[derive(Default)]
struct Definition {
    lse: Vec<f64>,
    o: Vec<f64>,
    o_error: Vec<f64>,
    d_q: Vec<f64>,
    d_q_error: Vec<f64>,
    d_k: Vec<f64>,
    d_k_error: Vec<f64>,
    d_v: Vec<f64>,
    d_v_error: Vec<f64>,
}

/// Weights p and s are rounded before they meet a row, sums once more at the end, and δ is summed from rounded outputs;
/// `Definition` adds up how much each matters. A quarter more for sums and exponentials in f32.
const HALF_EPSILONS: f64 = 1.25;
/// A logarithm of f32 sums of f32 exponentials.
const LSE_TOLERANCE: f64 = 1e-5;

impl Definition {
    fn new<T: Storage>(problem: &Problem, [q, k, v, d_o]: [&[f64]; 4]) -> Self {
        let rounded = |x: f64| x.abs().max(T::SMALLEST);
        let Problem { images, heads, dim, queries, keys, causal, .. } = *problem;
        let scale = f64::from(problem.scale());
        let zeros = |like: &[f64]| vec![0.0; like.len()];
        let mut it = Self {
            o: zeros(q),
            o_error: zeros(q),
            d_q: zeros(q),
            d_q_error: zeros(q),
            d_k: zeros(k),
            d_k_error: zeros(k),
            d_v: zeros(k),
            d_v_error: zeros(k),
            ..Self::default()
        };
        for (image, head) in (0..images).flat_map(|image| (0..heads).map(move |head| (image, head))) {
            let at = |length: usize, row: usize| {
                let first = ((image * length + row) * heads + head) * dim;
                first..first + dim
            };
            for row in 0..queries {
                let query = at(queries, row);
                let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
                let score = |key| match causal && key > row {
                    true => f64::NEG_INFINITY,
                    false => scale * dot(&q[query.clone()], &k[at(keys, key)]),
                };
                let scores: Vec<f64> = (0..keys).map(score).collect();
                let lse = scores.iter().map(|score| score.exp()).sum::<f64>().ln();
                it.lse.push(lse);
                let weights: Vec<f64> = scores.iter().map(|score| (score - lse).exp()).collect();
                for (key, p) in weights.iter().enumerate() {
                    for (i, j) in query.clone().zip(at(keys, key)) {
                        it.o[i] += p * v[j];
                        it.o_error[i] += rounded(*p) * v[j].abs();
                    }
                }
                let (mut delta, mut delta_error) = (0.0, 0.0);
                for i in query.clone() {
                    it.o_error[i] += rounded(it.o[i]);
                    delta += d_o[i] * it.o[i];
                    delta_error += d_o[i].abs() * it.o_error[i];
                }
                for (key, p) in weights.iter().enumerate() {
                    let s = p * (dot(&d_o[query.clone()], &v[at(keys, key)]) - delta);
                    let s_error = rounded(s) + p * delta_error;
                    for (i, j) in query.clone().zip(at(keys, key)) {
                        it.d_q[i] += scale * s * k[j];
                        it.d_q_error[i] += scale * s_error * k[j].abs();
                        it.d_k[j] += scale * s * q[i];
                        it.d_k_error[j] += scale * s_error * q[i].abs();
                        it.d_v[j] += p * d_o[i];
                        it.d_v_error[j] += rounded(*p) * d_o[i].abs();
                    }
                }
            }
        }
        for (error, gradient) in
            [(&mut it.d_q_error, &it.d_q), (&mut it.d_k_error, &it.d_k), (&mut it.d_v_error, &it.d_v)]
        {
            error.iter_mut().zip(gradient).for_each(|(error, gradient)| *error += rounded(*gradient));
        }
        it
    }
}

/// Runs the forward kernel and compares.
fn forward<T: Storage>(head: Head, problem: &Problem) -> Result<(Tensors<T>, Definition), LaunchError> {
    let mut random = Uniform(problem.seed);
    let (query_rows, key_rows, width) =
        (problem.images * problem.queries, problem.images * problem.keys, problem.width());
    let [q, k, v, d_o] =
        [query_rows, key_rows, key_rows, query_rows].map(|rows| random.numbers::<T>(rows * width));
    let shift =
        |numbers: Vec<T>, by: f64| -> Vec<T> { numbers.iter().map(|x| T::round(x.value() + by)).collect() };
    let (q, k) = (shift(q, problem.offset), shift(k, -problem.offset));
    let definition = Definition::new::<T>(problem, [&values(&q), &values(&k), &values(&v), &values(&d_o)]);
    let tensors = Tensors {
        q: Matrix::from_slice(&q, width, 8),
        k: Matrix::from_slice(&k, width, 16),
        v: Matrix::from_slice(&v, width, 24),
        d_o: Matrix::from_slice(&d_o, width, 32),
        o: Matrix::unwritten(query_rows, width, 40),
        lse: Buffer::unwritten(problem.images * problem.heads * problem.queries),
    };
    let Tensors { q, k, v, o, lse, .. } = &tensors;
    let lengths = [problem.queries, problem.keys].map(|length| Argument::from(length as i32));
    let strides = [o.stride(), q.stride(), k.stride(), v.stride()].map(Argument::from);
    let scalars = [problem.scale().into(), i32::from(problem.causal).into()];
    let run = |o: &Matrix<T>, lse: Argument<'_>| {
        let pointers = [o.into(), lse, q.into(), k.into(), v.into()];
        let arguments = [&pointers, lengths.as_slice(), &strides, &scalars].concat();
        problem.launch::<T>("forward", head.forward, problem.queries, 1, &arguments)
    };
    run(o, lse.into())?;
    let without_lse = Matrix::unwritten(query_rows, width, 40);
    run(&without_lse, Argument::NULL)?;
    assert_eq!(without_lse.values(), o.values());

    let what = format!("{} {problem:?}", T::NAME);
    let half_epsilon = HALF_EPSILONS * T::EPSILON / 2.0;
    assert_close(&format!("o, {what}"), &o.values(), &definition.o, |i| half_epsilon * definition.o_error[i]);
    assert_close(&format!("lse, {what}"), &values(&lse.to_vec()), &definition.lse, |_| LSE_TOLERANCE);
    Ok((tensors, definition))
}

/// Runs the forward and all backward kernels and compares; the tail has `n` keys, its queries are split in `splits`.
fn backward<T: Storage>(head: Head, problem: &Problem, n: usize, splits: usize) -> Result<(), LaunchError> {
    let (tensors, definition) = forward::<T>(head, problem)?;
    let Tensors { q, k, v, d_o, o, lse } = &tensors;
    let (width, images) = (problem.width(), problem.images);
    let d_q = Matrix::<T>::unwritten(images * problem.queries, width, 48);
    let d_k = Matrix::<T>::unwritten(images * problem.keys, width, 56);
    let d_v = Matrix::<T>::unwritten(images * problem.keys, width, 64);
    let delta = Buffer::<f32>::unwritten(images * problem.heads * problem.queries);
    let lengths = [problem.queries, problem.keys].map(|length| Argument::from(length as i32));
    let inputs = [q.stride(), k.stride(), v.stride()].map(Argument::from);
    let scale = [Argument::from(problem.scale())];

    let pointers = [&d_q, d_o, o].map(Argument::from);
    let [d_q_pointer, d_o_pointer, o_pointer] = pointers;
    let pointers =
        [d_q_pointer, (&delta).into(), d_o_pointer, o_pointer, lse.into(), q.into(), k.into(), v.into()];
    let strides = [d_q.stride(), d_o.stride(), o.stride()].map(Argument::from);
    let arguments = [&pointers, lengths.as_slice(), &strides, &inputs, &scale].concat();
    problem.launch::<T>("backward_queries", head.queries, problem.queries, 1, &arguments)?;

    let given = [d_o.into(), lse.into(), (&delta).into(), q.into(), k.into(), v.into()];
    let strides = [d_k.stride(), d_v.stride(), d_o.stride()].map(Argument::from);
    let arguments =
        [&[(&d_k).into(), (&d_v).into()], given.as_slice(), &lengths, &strides, &inputs, &scale].concat();
    problem.launch::<T>("backward_keys", head.keys, problem.keys, 1, &arguments)?;

    // The tail's d_k and d_v side by side, [splits, B, n, 2 · width].
    let count = images * n * 2 * width;
    let parts = Buffer::<f32>::unwritten(splits * count);
    let tail =
        [n as i32, splits as i32, 2 * width as i32, 2 * width as i32, d_o.stride()].map(Argument::from);
    let arguments =
        [&[(&parts).into(), parts.at(width)], given.as_slice(), &lengths, &tail, &inputs, &scale].concat();
    problem.launch::<T>("backward_tail", head.tail, n, splits, &arguments)?;
    let sums = Buffer::<T>::unwritten(count);
    let arguments = [(&sums).into(), (&parts).into(), (count as i32).into(), (splits as i32).into()];
    let grid = [count.div_ceil(256) as u32, 1, 1];
    let name = &format!("sum_splits_{}", T::NAME);
    Launch { name, grid, block: [256, 1, 1], shared_bytes: 0, cluster: 1 }.run(&arguments)?;
    let sums = values(&sums.to_vec());

    let what = format!("{} {problem:?}", T::NAME);
    let half_epsilon = HALF_EPSILONS * T::EPSILON / 2.0;
    assert_close(&format!("d_q, {what}"), &d_q.values(), &definition.d_q, |i| {
        half_epsilon * definition.d_q_error[i]
    });
    for (name, all, column, expected, error) in [
        ("d_k", &d_k, 0, &definition.d_k, &definition.d_k_error),
        ("d_v", &d_v, width, &definition.d_v, &definition.d_v_error),
    ] {
        assert_close(&format!("{name}, {what}"), &all.values(), expected, |i| half_epsilon * error[i]);
        let tail_of = |all: &[f64]| -> Vec<f64> {
            let images = all.chunks(problem.keys * width);
            images.flat_map(|image| &image[(problem.keys - n) * width..]).copied().collect()
        };
        let (expected, error) = (tail_of(expected), tail_of(error));
        let got: Vec<f64> = sums.chunks(2 * width).flat_map(|row| &row[column..][..width]).copied().collect();
        assert_close(&format!("tail of {name}, {what}"), &got, &expected, |i| half_epsilon * error[i]);
    }
    Ok(())
}

fn backward_at_all_sizes<T: Storage>(head: Head) -> Result<(), LaunchError> {
    let rows = head.queries.rows;
    let sizes = [(1, 1), (rows - 1, 15), (rows, 64), (rows + 1, 65), (37, 77), (13, 131), (150, 33)];
    for (i, (queries, keys)) in sizes.into_iter().enumerate() {
        let problem = Problem {
            images: 1 + i % 2,
            heads: 2,
            dim: head.dim,
            queries,
            keys,
            causal: false,
            offset: 0.0,
            seed: 7 + i as u64,
        };
        backward::<T>(head, &problem, [1, 5, 16, 17][i % 4].min(keys), 1 + (i + 2) % 3)?;
    }
    Ok(())
}

#[test]
fn gradients_f16() -> Result<(), LaunchError> {
    HEADS.into_iter().chain(HOPPER).try_for_each(backward_at_all_sizes::<f16>)
}

#[test]
fn gradients_bf16() -> Result<(), LaunchError> {
    HEADS.into_iter().chain(HOPPER).try_for_each(backward_at_all_sizes::<bf16>)
}

#[test]
fn causal() -> Result<(), LaunchError> {
    for head in HEADS.into_iter().chain(HOPPER) {
        for length in [1, 77, 150] {
            let problem = Problem {
                images: 1,
                heads: 2,
                dim: head.dim,
                queries: length,
                keys: length,
                causal: true,
                offset: 0.0,
                seed: 3,
            };
            forward::<f16>(head, &problem)?;
        }
    }
    Ok(())
}

/// Exponentials of a key that does not exist overflow when all others are tiny: it must not matter.
#[test]
fn scores_far_below_zero() -> Result<(), LaunchError> {
    for (head, offset) in HEADS.into_iter().chain(HOPPER).zip([1.3, 1.2, 1.0, 1.0, 0.8, 1.2, 1.0, 1.0]) {
        let problem = Problem {
            images: 1,
            heads: 1,
            dim: head.dim,
            queries: 18,
            keys: 77,
            causal: false,
            offset,
            seed: 1,
        };
        backward::<f16>(head, &problem, 5, 1)?;
    }
    Ok(())
}

#[test]
fn in_any_order_of_threads() -> Result<(), LaunchError> {
    for (head, seed) in HEADS.into_iter().chain(HOPPER).zip(1..) {
        let problem = Problem {
            images: 1,
            heads: 1,
            dim: head.dim,
            queries: 70,
            keys: 150,
            causal: false,
            offset: 0.0,
            seed,
        };
        shuffled(seed, || backward::<f16>(head, &problem, 5, 2))?;
    }
    Ok(())
}
