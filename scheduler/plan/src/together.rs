//! Which VMs are on which nodes, as far as some VM's affinity or anti-affinity asks: counts by node and term, kept as moves
//! are planned. In a cluster without such rules it is empty and costs nothing.

use std::collections::HashMap;

use crate::labels::{Label, Labels, Rules, Term};

/// What one VM, or one that is to come, has to do with the terms that are asked for, as their numbers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Marks {
    /// Terms that its labels are as asked by.
    matches: Vec<u32>,
    /// Terms that it asks for.
    affinity: Vec<u32>,
    /// Terms that it refuses.
    anti: Vec<u32>,
}

/// Of one node and one term.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    /// VMs that match, here or arriving.
    matching: u32,
    /// Of these, those that do not leave.
    staying: u32,
    /// VMs that refuse what matches, here or arriving.
    refusing: u32,
}

/// Where a VM must not go, and by which term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Apart<'a> {
    /// None of those it asks for is there.
    Missing(&'a Term),
    /// One that it refuses is there.
    Refused(&'a Term),
    /// One there refuses it.
    Refuses(&'a Term),
}

#[derive(Debug, Default)]
pub(crate) struct Together<'a> {
    numbers: HashMap<&'a Term, u32>,
    terms: Vec<&'a Term>,
    equals: HashMap<&'a Label, u32>,
    present: HashMap<&'a str, u32>,
    differs: Vec<u32>,
    marks: HashMap<usize, Marks>,
    counts: HashMap<(usize, u32), Count>,
    /// VMs that match each term, in the whole cluster.
    everywhere: Vec<u32>,
}

static NOTHING: Marks = Marks {
    matches: Vec::new(),
    affinity: Vec::new(),
    anti: Vec::new(),
};

impl<'a> Together<'a> {
    /// Knows the terms of these rules.
    pub fn new(rules: impl Iterator<Item = &'a Rules>) -> Self {
        let mut together = Self::default();
        for term in rules.flat_map(|rules| rules.affinity.iter().chain(&rules.anti_affinity)) {
            if together.numbers.contains_key(term) {
                continue;
            }
            let number = u32::try_from(together.terms.len()).unwrap_or(u32::MAX);
            together.numbers.insert(term, number);
            together.terms.push(term);
            match term {
                Term::Present(key) => {
                    together.present.insert(key, number);
                }
                Term::Equals(label) => {
                    together.equals.insert(label, number);
                }
                Term::Differs(_) => together.differs.push(number),
            }
        }
        together.everywhere = vec![0; together.terms.len()];
        together
    }

    /// Nothing is asked for by any VM.
    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    /// What labels and rules have to do with the terms.
    pub fn marks_of(&self, labels: &Labels, rules: Option<&Rules>) -> Marks {
        if self.is_empty() {
            return Marks::default();
        }
        let mut matches: Vec<u32> = Vec::new();
        for label in labels.iter() {
            matches.extend(self.equals.get(label));
            matches.extend(self.present.get(label.key()));
        }
        let differs = self.differs.iter().copied();
        matches.extend(differs.filter(|&number| self.terms[number as usize].matches(labels)));
        let numbers = |terms: &[Term]| {
            let known = terms.iter().filter_map(|term| self.numbers.get(term));
            known.copied().collect()
        };
        Marks {
            matches,
            affinity: rules.map_or_else(Vec::new, |rules| numbers(&rules.affinity)),
            anti: rules.map_or_else(Vec::new, |rules| numbers(&rules.anti_affinity)),
        }
    }

    /// Remembers what a VM has to do with the terms, and counts it once in the cluster.
    pub fn add_vm(&mut self, vm: usize, marks: Marks) {
        if marks.matches.is_empty() && marks.affinity.is_empty() && marks.anti.is_empty() {
            return;
        }
        for &term in &marks.matches {
            self.everywhere[term as usize] += 1;
        }
        self.marks.insert(vm, marks);
    }

    /// Of a VM.
    pub fn marks(&self, vm: usize) -> &Marks {
        self.marks.get(&vm).unwrap_or(&NOTHING)
    }

    /// Whether rules tie a VM to others, or others to it.
    pub fn ties(&self, vm: usize) -> bool {
        self.marks.contains_key(&vm)
    }

    /// Nodes with those that a VM asks to be with, up to so many.
    pub fn places(&self, vm: usize, most: usize) -> Vec<usize> {
        let Some(term) = self.marks(vm).affinity.first() else {
            return Vec::new();
        };
        let with = self.counts.iter();
        let with = with.filter(|((_, of), count)| of == term && count.staying > 0);
        let mut nodes: Vec<usize> = with.map(|((node, _), _)| *node).collect();
        nodes.sort_unstable();
        nodes.truncate(most);
        nodes
    }

    /// Whether one with these marks asks to be with a VM.
    pub fn is_wanted(&self, vm: usize, marks: &Marks) -> bool {
        let matches = &self.marks(vm).matches;
        marks.affinity.iter().any(|term| matches.contains(term))
    }

    /// Counts a VM on a node that it is on or comes to.
    pub fn add(&mut self, vm: usize, node: usize) {
        if let Some(marks) = self.marks.get(&vm) {
            for &term in &marks.matches {
                let count = self.counts.entry((node, term)).or_default();
                count.matching += 1;
                count.staying += 1;
            }
            for &term in &marks.anti {
                self.counts.entry((node, term)).or_default().refusing += 1;
            }
        }
    }

    /// A VM counted on a node leaves it.
    pub fn leave(&mut self, vm: usize, node: usize) {
        if let Some(marks) = self.marks.get(&vm) {
            for &term in &marks.matches {
                self.counts.entry((node, term)).or_default().staying -= 1;
            }
        }
    }

    /// What speaks against a VM with these marks on a node, itself not counted there. `from`: the node that it leaves, if it
    /// is on one. If it `must_leave`, all those it asks for may be there too if none is elsewhere: it goes first and they
    /// follow.
    pub fn against(
        &self,
        marks: &Marks,
        node: usize,
        from: Option<usize>,
        must_leave: bool,
    ) -> Option<Apart<'a>> {
        for &term in &marks.anti {
            if self.count(node, term).matching > 0 {
                return Some(Apart::Refused(self.terms[term as usize]));
            }
        }
        for &term in &marks.matches {
            if self.count(node, term).refusing > 0 {
                return Some(Apart::Refuses(self.terms[term as usize]));
            }
        }
        for &term in &marks.affinity {
            if self.count(node, term).staying > 0 {
                continue;
            }
            let everywhere = self.everywhere[term as usize];
            let matches = marks.matches.contains(&term);
            let first = matches && everywhere == u32::from(from.is_some());
            let leads = must_leave && from.is_none_or(|from| everywhere == self.count(from, term).staying);
            if !first && !leads {
                return Some(Apart::Missing(self.terms[term as usize]));
            }
        }
        None
    }

    /// What is wrong with a VM where it stays.
    pub fn wrong(&self, vm: usize, node: usize) -> Option<Apart<'a>> {
        let marks = self.marks(vm);
        let own = |term: &u32| u32::from(marks.matches.contains(term));
        for term in &marks.anti {
            if self.count(node, *term).staying > own(term) {
                return Some(Apart::Refused(self.terms[*term as usize]));
            }
        }
        for term in &marks.affinity {
            let alone = own(term) == 1 && self.everywhere[*term as usize] == 1;
            if self.count(node, *term).staying <= own(term) && !alone {
                return Some(Apart::Missing(self.terms[*term as usize]));
            }
        }
        None
    }

    /// Whether one that stays on the node would miss a VM that leaves it.
    pub fn is_needed(&self, vm: usize, node: usize, mut staying: impl Iterator<Item = usize>) -> bool {
        let leaving = self.marks(vm);
        if leaving.matches.is_empty() {
            return false;
        }
        staying.any(|other| {
            let marks = self.marks(other);
            other != vm
                && marks.affinity.iter().any(|term| {
                    let own = u32::from(marks.matches.contains(term));
                    leaving.matches.contains(term) && self.count(node, *term).staying == own + 1
                })
        })
    }

    fn count(&self, node: usize, term: u32) -> Count {
        self.counts.get(&(node, term)).copied().unwrap_or_default()
    }
}
