const s = require('fs').readFileSync(0, 'utf8').trim().split('\n');
console.log(s.map(Number).reduce((a, b) => a + b, 0)); console.error('x');
