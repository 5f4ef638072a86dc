//! `scheduler/scheduler_config.json`, and what follows from it before any step is taken.

use std::str::FromStr;

use serde::Deserialize;

use crate::{Error, ModelFiles, Result};

const FILE: &str = "scheduler/scheduler_config.json";

/// The schedulers there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchedulerKind {
    /// `DDPMScheduler` (Ho et al., arXiv 2006.11239).
    Ddpm,
    /// `DDIMScheduler` (Song et al., arXiv 2010.02502), η = 0.
    Ddim,
    /// `PNDMScheduler`, also called PLMS (Liu et al., arXiv 2202.09778).
    Pndm,
    /// `EulerDiscreteScheduler` (Karras et al., arXiv 2206.00364, algorithm 2 without churn).
    Euler,
    /// `EulerAncestralDiscreteScheduler` (k-diffusion).
    EulerAncestral,
    /// `DPMSolverMultistepScheduler`, DPM-Solver++ 2M (Lu et al., arXiv 2211.01095).
    DpmSolverMultistep,
    /// `UniPCMultistepScheduler` (Zhao et al., arXiv 2302.04867), order 2, B(h) = e^h − 1.
    UniPc,
}

impl SchedulerKind {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Ddpm,
        Self::Ddim,
        Self::Pndm,
        Self::Euler,
        Self::EulerAncestral,
        Self::DpmSolverMultistep,
        Self::UniPc,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        ["ddpm", "ddim", "pndm", "euler", "euler-a", "dpm++", "unipc"][self as usize]
    }
}

impl FromStr for SchedulerKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| Error::Argument {
            argument: "scheduler",
            expected: Self::ALL.map(Self::name).join(", "),
            got: name.into(),
        })
    }
}

/// What the network was trained to predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise ε.
    Epsilon,
    /// `√ᾱ ε − √(1 − ᾱ) x₀` (Salimans & Ho, arXiv 2202.00512).
    VPrediction,
}

/// How β runs over the training timesteps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// Straight from `beta_start` to `beta_end`.
    Linear,
    /// Straight in √β; Stable Diffusion's.
    ScaledLinear,
    /// From a squared cosine ᾱ, β at most 0.999.
    #[serde(rename = "squaredcos_cap_v2")]
    SquaredcosCapV2,
}

/// Which of the training timesteps are used (arXiv 2305.08891, table 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestepSpacing {
    /// From 0 in equal steps.
    Leading,
    /// From the last in equal steps.
    Trailing,
    /// First and last, and equal steps between.
    Linspace,
}

/// The fields of `scheduler_config.json`. What is absent takes the default of the scheduler that is built.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct SchedulerConfig {
    /// Number of training timesteps.
    pub num_train_timesteps: usize,
    /// First β.
    pub beta_start: f64,
    /// Last β.
    pub beta_end: f64,
    /// How β runs between them.
    pub beta_schedule: BetaSchedule,
    /// What the network predicts.
    pub prediction_type: PredictionType,
    /// Which timesteps are used; by default leading (DDPM, DDIM, PNDM) or linspace.
    pub timestep_spacing: Option<TimestepSpacing>,
    /// Added to leading timesteps.
    pub steps_offset: usize,
    /// Whether the last step of DDIM and PNDM goes to ᾱ = 1 rather than to ᾱ of timestep 0; by default true (DDIM), false
    /// (PNDM).
    pub set_alpha_to_one: Option<bool>,
    /// Whether DDIM and DDPM clip the predicted picture; by default true.
    pub clip_sample: Option<bool>,
    /// To ± this.
    pub clip_sample_range: f64,
    /// Whether PNDM begins with multistep steps of low order rather than with Runge–Kutta steps; by default false, and true in
    /// Stable Diffusion's own files.
    pub skip_prk_steps: bool,
    /// Whether the betas are rescaled to end in pure noise (arXiv 2305.08891, algorithm 1).
    pub rescale_betas_zero_snr: bool,
    /// Whether σ follows Karras et al.'s schedule (Euler, DPM-Solver++, UniPC).
    pub use_karras_sigmas: bool,
    /// `zero` or `sigma_min`.
    pub final_sigmas_type: Option<String>,
    /// Whether multistep solvers end with a low order when steps are few; by default true.
    pub lower_order_final: Option<bool>,
    /// Whether DPM-Solver++ ends with an Euler step.
    pub euler_at_final: bool,
    /// Order of the multistep solvers, 1 or 2.
    pub solver_order: usize,
    /// DPM-Solver++: `midpoint` or `heun`.
    pub solver_type: Option<String>,
    /// Fields that must keep their default here.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 1e-4,
            beta_end: 0.02,
            beta_schedule: BetaSchedule::Linear,
            prediction_type: PredictionType::Epsilon,
            timestep_spacing: None,
            steps_offset: 0,
            set_alpha_to_one: None,
            clip_sample: None,
            clip_sample_range: 1.0,
            skip_prk_steps: false,
            rescale_betas_zero_snr: false,
            use_karras_sigmas: false,
            final_sigmas_type: None,
            lower_order_final: None,
            euler_at_final: false,
            solver_order: 2,
            solver_type: None,
            other: serde_json::Map::new(),
        }
    }
}

/// Fields that would change the result and are not built here, with the values that leave it alone.
const MUST_BE: [(&str, &[&str]); 12] = [
    ("trained_betas", &["null"]),
    ("thresholding", &["false"]),
    ("use_exponential_sigmas", &["false"]),
    ("use_beta_sigmas", &["false"]),
    ("use_lu_lambdas", &["false"]),
    ("use_flow_sigmas", &["false"]),
    ("interpolation_type", &["\"linear\""]),
    ("timestep_type", &["\"discrete\""]),
    ("algorithm_type", &["\"dpmsolver++\"", "\"deis\""]),
    ("predict_x0", &["true"]),
    ("disable_corrector", &["[]"]),
    ("variance_type", &["null", "\"fixed_small\""]),
];

impl SchedulerConfig {
    /// Reads `scheduler/scheduler_config.json`.
    ///
    /// # Errors
    /// When it is missing, or a field has a value that is not known.
    pub fn load(files: &ModelFiles) -> Result<Self> {
        files.read_config(FILE)
    }

    /// Stable Diffusion 1.x's schedule, as its file says it.
    pub fn stable_diffusion() -> Self {
        Self {
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            steps_offset: 1,
            set_alpha_to_one: Some(false),
            clip_sample: Some(false),
            skip_prk_steps: true,
            ..Self::default()
        }
    }

    pub(super) fn validate(&self, kind: SchedulerKind, num_inference_steps: usize) -> Result<()> {
        let fail = |field: &str, got: String, expected: &str| {
            Err(Error::UnsupportedConfig {
                file: FILE.into(),
                field: field.into(),
                got,
                expected: expected.into(),
            })
        };
        let train = self.num_train_timesteps;
        if !(2..=100_000).contains(&train) {
            return fail("num_train_timesteps", train.to_string(), "2 to 100000");
        }
        let ordered = 0.0 < self.beta_start && self.beta_start <= self.beta_end && self.beta_end < 1.0;
        if !ordered {
            return fail(
                "beta_start, beta_end",
                format!("{}, {}", self.beta_start, self.beta_end),
                "0 < beta_start ≤ beta_end < 1",
            );
        }
        if self.steps_offset > 1 {
            return fail("steps_offset", self.steps_offset.to_string(), "0 or 1");
        }
        if !(1..=2).contains(&self.solver_order) {
            return fail("solver_order", self.solver_order.to_string(), "1 or 2");
        }
        if let Some(other) = self.final_sigmas_type.as_deref().filter(|t| !matches!(*t, "zero" | "sigma_min"))
        {
            return fail("final_sigmas_type", other.into(), "zero or sigma_min");
        }
        for (field, allowed) in MUST_BE {
            if let Some(value) = self.other.get(field).filter(|v| !allowed.contains(&v.to_string().as_str()))
            {
                return fail(field, value.to_string(), allowed[0]);
            }
        }
        if num_inference_steps == 0 || num_inference_steps >= train {
            return Err(Error::Argument {
                argument: "steps",
                expected: format!("1 to {}", train - 1),
                got: num_inference_steps.to_string(),
            });
        }
        let least = match kind {
            SchedulerKind::Pndm if self.skip_prk_steps => 2,
            SchedulerKind::Pndm => 4,
            _ => 1,
        };
        if num_inference_steps < least {
            return Err(Error::Argument {
                argument: "steps",
                expected: format!("at least {least} with pndm"),
                got: num_inference_steps.to_string(),
            });
        }
        Ok(())
    }

    /// ᾱ of every training timestep, in `f32` as diffusers computes them.
    pub fn alphas_cumprod(&self) -> Vec<f32> {
        let betas = self.betas();
        let mut alphas_cumprod = cumulative_product(betas.iter().map(|b| 1.0 - b));
        if self.rescale_betas_zero_snr {
            alphas_cumprod = zero_terminal_snr(&alphas_cumprod);
        }
        alphas_cumprod
    }

    fn betas(&self) -> Vec<f32> {
        let n = self.num_train_timesteps;
        match self.beta_schedule {
            BetaSchedule::Linear => linspace(self.beta_start as f32, self.beta_end as f32, n),
            BetaSchedule::ScaledLinear => {
                let roots = linspace(self.beta_start.sqrt() as f32, self.beta_end.sqrt() as f32, n);
                roots.into_iter().map(|root| root * root).collect()
            }
            BetaSchedule::SquaredcosCapV2 => {
                let alpha_bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
                let at = |i: usize| alpha_bar(i as f64 / n as f64);
                (0..n).map(|i| (1.0 - at(i + 1) / at(i)).min(0.999) as f32).collect()
            }
        }
    }

    /// Timesteps in descending order, as every scheduler but PNDM and the multistep ones spaces them.
    pub(super) fn timesteps(&self, default: TimestepSpacing, n: usize) -> Vec<f64> {
        let train = self.num_train_timesteps;
        match self.timestep_spacing.unwrap_or(default) {
            TimestepSpacing::Linspace => {
                let step = (train - 1) as f64 / (n.max(2) - 1) as f64;
                (0..n).rev().map(|i| i as f64 * step).collect()
            }
            TimestepSpacing::Leading => {
                let ratio = train / n;
                (0..n).rev().map(|i| (i * ratio + self.steps_offset) as f64).collect()
            }
            TimestepSpacing::Trailing => trailing(train, n),
        }
    }
}

/// `round(train, train − train/n, …) − 1`; the count follows numpy's `arange`.
pub(super) fn trailing(train: usize, n: usize) -> Vec<f64> {
    let step = train as f64 / n as f64;
    let count = (train as f64 / step).ceil() as usize;
    (0..count).map(|i| (train as f64 - i as f64 * step).round_ties_even() - 1.0).collect()
}

/// `torch.linspace` in `f32`: from both ends towards the middle.
fn linspace(start: f32, end: f32, n: usize) -> Vec<f32> {
    let step = (end - start) / (n - 1) as f32;
    (0..n)
        .map(|i| if i < n / 2 { start + step * i as f32 } else { end - step * (n - 1 - i) as f32 })
        .collect()
}

/// `torch.cumprod` of `f32` values: carried in `f64`.
fn cumulative_product(values: impl Iterator<Item = f32>) -> Vec<f32> {
    let mut product = 1f64;
    values
        .map(|v| {
            product *= f64::from(v);
            product as f32
        })
        .collect()
}

/// ᾱ shifted and scaled so that the last is 0 and the first stays (arXiv 2305.08891, algorithm 1), by way of the betas.
fn zero_terminal_snr(alphas_cumprod: &[f32]) -> Vec<f32> {
    let roots: Vec<f32> = alphas_cumprod.iter().map(|a| a.sqrt()).collect();
    let (first, last) = (roots[0], roots[roots.len() - 1]);
    let bar: Vec<f32> = roots.iter().map(|r| ((r - last) * (first / (first - last))).powi(2)).collect();
    let ratios = bar.windows(2).map(|pair| pair[1] / pair[0]);
    // 1 − (1 − α): the betas are what is stored between the two.
    cumulative_product(std::iter::once(bar[0]).chain(ratios).map(|alpha| 1.0 - (1.0 - alpha)))
}
