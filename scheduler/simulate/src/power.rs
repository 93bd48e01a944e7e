//! Power of a host by its CPU use: the SPECpower measurements of the two hosts that Beloglazov and Buyya (2012) simulate.

use serde::Serialize;

/// Watts at 0, 10, … 100 % CPU.
type Table = [f64; 11];

/// HP ProLiant ML110 G4, Xeon 3040: 2 cores of 1860 MIPS, 4 GB.
const ML110_G4: Table = [
    86.0, 89.4, 92.6, 96.0, 99.5, 102.0, 106.0, 108.0, 112.0, 114.0, 117.0,
];
/// HP ProLiant ML110 G5, Xeon 3075: 2 cores of 2660 MIPS, 4 GB.
const ML110_G5: Table = [
    93.7, 97.0, 101.0, 105.0, 110.0, 116.0, 121.0, 125.0, 129.0, 133.0, 135.0,
];

/// How much power a host takes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PowerModel {
    /// HP ProLiant ML110 G4.
    G4,
    /// HP ProLiant ML110 G5.
    #[default]
    G5,
}

impl PowerModel {
    /// By its name in a scenario.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "g4" => Some(Self::G4),
            "g5" => Some(Self::G5),
            _ => None,
        }
    }

    /// Watts while switched on, at a CPU use of 0 to 1; linear between the measured points.
    #[must_use]
    pub fn watts(self, utilisation: f64) -> f64 {
        let table = match self {
            Self::G4 => &ML110_G4,
            Self::G5 => &ML110_G5,
        };
        let tenths = (utilisation.clamp(0.0, 1.0)) * 10.0;
        for (step, pair) in table.windows(2).enumerate() {
            let within = tenths - step as f64;
            if within <= 1.0 {
                return pair[0] + (pair[1] - pair[0]) * within;
            }
        }
        table[10]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_the_points_it_is_linear() {
        assert_eq!(PowerModel::G4.watts(0.0), 86.0);
        assert_eq!(PowerModel::G4.watts(1.0), 117.0);
        assert_eq!(PowerModel::G5.watts(0.5), 116.0);
        assert!((PowerModel::G5.watts(0.25) - 103.0).abs() < 1e-9);
        assert_eq!(PowerModel::G5.watts(7.0), 135.0);
    }
}
