//! How a picture was made, as its file says it.

use sd_models::schedulers::SchedulerKind;
use serde::Serialize;

/// Everything that another drawing of the same picture needs.
#[derive(Debug, Clone, Serialize)]
pub struct Recipe {
    /// Version of this program.
    pub version: &'static str,
    /// The sentence.
    pub prompt: String,
    /// What the picture should not show.
    pub negative_prompt: String,
    /// Seed of the initial latents.
    pub seed: u64,
    /// Denoising steps.
    pub steps: usize,
    /// Strength of the guidance.
    pub guidance_scale: f64,
    /// Scheduler, as on the command line.
    pub scheduler: &'static str,
    /// Pixels.
    pub width: usize,
    /// Pixels.
    pub height: usize,
    /// The checkpoint.
    pub model: String,
    /// Its fingerprint.
    pub model_hash: String,
    /// The tail behind the sentence.
    pub embedding: Option<TailUse>,
}

/// A tail, as a picture used it.
#[derive(Debug, Clone, Serialize)]
pub struct TailUse {
    /// Its file.
    pub file: String,
    /// Its tokens.
    pub n_hiper: usize,
    /// What it was multiplied by.
    pub tail_scale: f64,
}

impl Recipe {
    /// The PNG's text chunks: `parameters`, the line that most programs read, and `hiper`, all of it as JSON.
    pub fn texts(&self) -> Vec<(&'static str, String)> {
        let json = serde_json::to_string(self).unwrap_or_default();
        vec![("parameters", self.parameters()), ("hiper", json)]
    }

    fn parameters(&self) -> String {
        let Self { prompt, steps, guidance_scale, seed, width, height, model, .. } = self;
        let mut text = format!("{prompt}\n");
        if !self.negative_prompt.is_empty() {
            text += &format!("Negative prompt: {}\n", self.negative_prompt);
        }
        let sampler = sampler(self.scheduler);
        let model = quoted(model.rsplit(['/', '\\']).find(|part| !part.is_empty()).unwrap_or(model));
        let hash: String = self.model_hash.chars().take(10).collect();
        text += &format!(
            "Steps: {steps}, Sampler: {sampler}, CFG scale: {guidance_scale}, Seed: {seed}, Size: {width}x{height}, \
             Model hash: {hash}, Model: {model}"
        );
        if let Some(TailUse { file, n_hiper, tail_scale }) = &self.embedding {
            let file = quoted(file.rsplit(['/', '\\']).next().unwrap_or(file));
            text += &format!(", HiPer: {file}, HiPer tokens: {n_hiper}, HiPer scale: {tail_scale}");
        }
        text + &format!(", Version: hiper {}", self.version)
    }
}

/// Values with a separator in them stand in quotes.
fn quoted(value: &str) -> String {
    if value.contains([',', ':', '\n', '"']) { format!("{value:?}") } else { value.to_owned() }
}

/// The name that the `parameters` line has for a scheduler.
fn sampler(scheduler: &str) -> &str {
    const NAMES: [&str; 7] = ["DDPM", "DDIM", "PLMS", "Euler", "Euler a", "DPM++ 2M", "UniPC"];
    let index = SchedulerKind::ALL.iter().position(|kind| kind.name() == scheduler);
    index.and_then(|i| NAMES.get(i).copied()).unwrap_or(scheduler)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parameters_line_is_the_common_one() {
        let embedding = TailUse { file: "out/my, tail.safetensors".into(), n_hiper: 5, tail_scale: 0.8 };
        let recipe = Recipe {
            version: "0.1.0",
            prompt: "a dog jumping".into(),
            negative_prompt: "blurry".into(),
            seed: 3,
            steps: 20,
            guidance_scale: 7.5,
            scheduler: "euler-a",
            width: 512,
            height: 256,
            model: "models/sd15/".into(),
            model_hash: "0123456789abcdef".into(),
            embedding: Some(embedding),
        };
        let [(_, parameters), (_, json)] = &recipe.texts()[..] else { panic!("two chunks") };
        let expected = "a dog jumping\nNegative prompt: blurry\nSteps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 3, \
                        Size: 512x256, Model hash: 0123456789, Model: sd15, HiPer: \"my, tail.safetensors\", \
                        HiPer tokens: 5, HiPer scale: 0.8, Version: hiper 0.1.0";
        assert_eq!(parameters, expected);
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        assert_eq!((&json["seed"], &json["embedding"]["tail_scale"]), (&3.into(), &0.8.into()));
    }
}
