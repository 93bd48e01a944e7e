//! What became of the planner's predictions: kept as the server keeps it, so that the planner's margins are those of a cluster.

use std::time::Duration;

use shoal_plan::{Margins, Predictions};

/// Growth is compared over at least so many seconds: about what a move takes.
const GROWTH_OVER: f64 = 3.0;
/// Longer than this between two reports is silence, not a delay.
const LONGEST_DELAY: f64 = 10.0;

/// Of all nodes together.
#[derive(Debug, Default)]
pub(crate) struct Foresight {
    predictions: Predictions,
    nodes: Vec<Heard>,
}

/// Of one node.
#[derive(Debug, Default)]
struct Heard {
    last: Option<f64>,
    /// VMs of the last report.
    vms: Vec<usize>,
    outlook: Option<Outlook>,
}

/// What a node's memory was when it was looked ahead.
#[derive(Debug, Clone, Copy)]
struct Outlook {
    at: f64,
    held: f64,
    rate: f64,
}

impl Foresight {
    pub fn new(nodes: usize) -> Self {
        Self {
            predictions: Predictions::default(),
            nodes: (0..nodes).map(|_| Heard::default()).collect(),
        }
    }

    /// What to allow for.
    pub fn margins(&self) -> Margins {
        self.predictions.margins()
    }

    /// Seconds since a node's last report came.
    pub fn report_age(&self, node: usize, now: f64) -> f64 {
        self.nodes[node].last.map_or(0.0, |last| (now - last).max(0.0))
    }

    /// A move that a plan made has taken so long.
    pub fn moved(&mut self, expected: Duration, took: f64) {
        self.predictions
            .moved(expected, Duration::from_secs_f64(took.max(0.0)));
    }

    /// A node's report comes: its VMs hold so much and grow so many bytes per second.
    pub fn reported(
        &mut self,
        node: usize,
        now: f64,
        interval: f64,
        vms: &[usize],
        (held, rate): (f64, f64),
    ) {
        let heard = &mut self.nodes[node];
        if let Some(last) = heard.last.replace(now)
            && now - last < LONGEST_DELAY
        {
            let seconds = |seconds: f64| Duration::from_secs_f64(seconds.max(0.0));
            self.predictions.reported(seconds(interval), seconds(now - last));
        }
        // While VMs come and go there is no outlook: that is no growth.
        let steady = heard.vms == vms;
        heard.vms.clear();
        heard.vms.extend_from_slice(vms);
        let before = heard.outlook.filter(|_| steady);
        let due = before.filter(|before| now - before.at >= GROWTH_OVER);
        if before.is_none() || due.is_some() {
            heard.outlook = steady.then_some(Outlook { at: now, held, rate });
        }
        if let Some(due) = due {
            self.predictions.grew(due.rate * (now - due.at), held - due.held);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_and_delays_that_were_not_expected_are_allowed_for() {
        let mut foresight = Foresight::new(1);
        for second in 0..1000_u32 {
            let now = f64::from(second * 2);
            // Reports come each 2 s instead of each second, and memory grows twice as fast as it seems to.
            foresight.reported(0, now, 1.0, &[1, 2], (2e7 * now, 1e7));
        }
        let margins = foresight.margins();
        assert!((margins.growth - 2.0).abs() < 1e-9, "{margins:?}");
        assert_eq!(margins.delay, Duration::from_secs(1));
        assert_eq!(foresight.report_age(0, 2000.5), 2.5);
        let before = foresight.margins();
        foresight.reported(0, 2000.0, 1.0, &[1, 2, 3], (9e9, 0.0));
        foresight.reported(0, 2100.0, 1.0, &[1, 2, 3], (9e9, 0.0));
        assert_eq!(
            foresight.margins(),
            before,
            "a VM that comes is no growth, and silence no delay"
        );
        for _ in 0..64 {
            foresight.moved(Duration::from_secs(2), 3.0);
        }
        assert_eq!(foresight.margins().move_time, 1.5);
    }
}
